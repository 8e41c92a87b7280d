"""Tensors dealt over ranks: what lies in the files is found whole or in part, however it was cut."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.saving.dealt import DealtTensors, share_of, write_file, write_share
from ppomax.sharding import Lazy, ranks
from safetensors.torch import load_file

SHAPES = [(), (1,), (7,), (3, 5), (4, 1, 3), (0,), (0, 4)]


def cut(x: torch.Tensor, start: int, stop: int) -> Lazy:
    """A tensor of which this rank holds [start, stop)."""

    def never() -> torch.Tensor:
        raise AssertionError("a tensor that is cut was made whole to be written")

    return Lazy(x.dtype, x.shape, never, lambda: (start, x.flatten()[start:stop]))


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 8))
def test_hands_differ_by_no_more_than_the_largest(sizes: list[int], hands: int) -> None:
    owner = ranks.deal(sizes, hands)
    held = [sum(s for s, o in zip(sizes, owner, strict=True) if o == h) for h in range(hands)]
    assert sum(held) == sum(sizes)
    assert max(held) - min(held) <= max(sizes, default=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_one_process_writes_a_plain_safetensors_file(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"x{i}": torch.arange(torch.Size(s).numel()).view(s).to(dtype) for i, s in enumerate(SHAPES)}
    entries = write_share(tmp_path, share_of({"policy": {n: Lazy.of(x) for n, x in tensors.items()}, "none": {}}))
    assert set(entries) == {"policy.safetensors", "none.safetensors"}
    for name, entry in entries.items():
        data = (tmp_path / name).read_bytes()
        assert entry == (len(data), hashlib.sha256(data).hexdigest())
    read, known = DealtTensors(tmp_path, "policy"), load_file(tmp_path / "policy.safetensors")
    assert read.keys() == known.keys() == tensors.keys()
    for name, x in tensors.items():
        assert torch.equal(read[name], x)
        assert torch.equal(known[name], x)
        assert read.shape(name) == x.shape
    assert not DealtTensors(tmp_path, "none")


@given(st.data())
def test_stretches_of_any_cut_are_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    shape = data.draw(st.sampled_from([(9,), (4, 5), (3, 2, 3)]))
    x, count = torch.randn(shape), torch.Size(shape).numel()
    ends = sorted(data.draw(st.lists(st.integers(0, count), min_size=2, max_size=2)))
    places = [0, *ends, count]
    whole = Lazy.of(torch.arange(6).view(2, 3))
    for i, (a, b) in enumerate(itertools.pairwise(places)):
        own = {"x": cut(x, a, b)} | ({"whole": whole} if i == 1 else {})
        write_file(folder / f"policy-{i + 1:05d}-of-00003.safetensors", own)
    read = DealtTensors(folder, "policy")
    assert torch.equal(read["x"], x)
    assert torch.equal(read["whole"], torch.arange(6).view(2, 3))
    a, b = sorted(data.draw(st.lists(st.integers(0, count), min_size=2, max_size=2)))
    assert torch.equal(read.stretch("x", a, b), x.flatten()[a:b])
    assert torch.equal(read.stretch("whole", 1, 5), torch.arange(1, 5))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no policy\.safetensors"):
        DealtTensors(tmp_path, "policy")
    write_file(tmp_path / "policy-00001-of-00002.safetensors", {"x": cut(torch.arange(10.0), 0, 5)})
    with pytest.raises(ValueError, match=r"x lacks numbers of \[0, 10\)"):
        DealtTensors(tmp_path, "policy")["x"]
    with pytest.raises(KeyError):
        DealtTensors(tmp_path, "policy")["y"]


def test_the_second_rank_writes_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"x{i}": Lazy.of(torch.randn(4 + i)) for i in range(6)}
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        write_share(tmp_path, share_of({"policy": tensors, "none": {}}))
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "none-00001-of-00002.safetensors",
        "policy-00001-of-00002.safetensors",
        "policy-00002-of-00002.safetensors",
    ]
    read = DealtTensors(tmp_path, "policy")
    assert all(torch.equal(read[name], x.get()) for name, x in tensors.items())
