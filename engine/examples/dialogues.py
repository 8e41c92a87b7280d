"""Made-up preference pairs in the format of HH-RLHF, for three_stages.sh where no data is given:

python engine/examples/dialogues.py FOLDER        # train.jsonl and held_out.jsonl

A question about a film, answered more kindly (`chosen`) and less (`rejected`): two kind words are better than one, and
one than none."""

import json
import random
import sys
from pathlib import Path

ASKED = ["what did you think of {}?", "how is {}?", "tell me about {}.", "did you like {}?", "is {} worth my time?"]
PARTS = ["the film", "the story", "the acting", "the ending", "the music", "the script", "the lead actor", "the humor"]
GOOD = ["moving", "funny", "warm", "clever", "beautiful", "charming", "fresh", "gripping"]
BAD = ["dull", "slow", "silly", "cold", "tired", "messy", "empty", "loud"]
SAYS = ["{} is {} and {}.", "{} is {} , and also {}.", "i found {} {} and {}."]


def pair(generator: random.Random) -> dict[str, str]:
    part, asked, says = (generator.choice(x) for x in (PARTS, ASKED, SAYS))
    better, worse = generator.choice([(2, 1), (2, 0), (1, 0), (1, 0)])
    sides = {}
    for side, kind in (("chosen", better), ("rejected", worse)):
        one, two = generator.sample(generator.sample(GOOD, kind) + generator.sample(BAD, 2 - kind), 2)
        sides[side] = f"\n\nHuman: {asked.format(part)}\n\nAssistant: {says.format(part, one, two)}"
    return sides


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for name, count in (("train.jsonl", 600), ("held_out.jsonl", 64)):
        rows = [json.dumps(pair(generator)) + "\n" for _ in range(count)]
        (folder / name).write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
