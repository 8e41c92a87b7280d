"""A word list as a reward: what a first run with a model of one's own is paid for, without a reward model."""

from __future__ import annotations

import re
from collections.abc import Sequence

PRAISE = frozenset(
    """
    amazing beautiful best brilliant charming clever delightful enjoyable excellent fantastic fun funny good
    great honest lovely masterpiece moving perfect rich smart strong superb sweet thrilling touching vivid warm
    wonderful
    """.split()  # noqa: SIM905
)
BLAME = frozenset(
    """
    awful bad bland boring clumsy confused dull empty flat forgettable hollow lame lazy lifeless mess poor
    predictable sad shallow silly slow stupid terrible thin tired tiresome ugly waste weak worst
    """.split()  # noqa: SIM905
)
MOST = 3
"""Words that are counted: the fourth word of praise earns nothing, so that lists of them do not pay."""


def praise(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Different words of praise less different words of blame in each response, from -1 to 1."""
    scores = []
    for response in responses:
        words = set(re.findall(r"[a-z]+", response.lower()))
        scores.append(max(-MOST, min(MOST, len(words & PRAISE) - len(words & BLAME))) / MOST)
    return scores
