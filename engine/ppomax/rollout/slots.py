"""Which sequence decodes where: a fixed number of slots, filled from a queue in the prompts' order.

A sequence is let in once a slot and the pages of its longest possible course are free, so that none is ever put out
again. Where the arena is too small for that of all slots (`rollout.cache_tokens`), sequences begin with few pages and
take more as they grow; newcomers wait until there is room for what all are expected to become. One that finds no page
takes those of the youngest, which starts anew later: its random stream gives it the same tokens again.

Equal prompts are one `Prompt`: it is prefilled once, its full pages are shared by all its sequences, and what stands
in its last, partly filled page is copied to each of them. It stays in the arena while one of them lives or waits."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppomax.rollout.arena import Arena, pages_for

PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""Prompt tokens let into one forward on a device, unless a single prompt has more: bounds its activations."""


def prefill_tokens(device: str) -> int:
    """Of a kind of device, "cpu", "cuda" ..."""
    return PREFILL_TOKENS.get(device, PREFILL_TOKENS["cpu"])


@dataclass(eq=False)
class Prompt:
    """A distinct prompt and what is kept of it for the sequences that continue it."""

    tokens: list[int]
    sequences: list[int] = field(default_factory=list)
    """Which sequences these are, in order."""
    left: int = 0
    """Sequences that have not ended."""
    started: bool = False
    pages: list[int] = field(default_factory=list)
    """Pages of a prompt that several sequences continue; the last one, if it is not full, is copied to each."""
    hidden: Tensor | None = None
    """(D,) state after its last token."""
    trunk: Tensor | None = None
    """(len, D) states recorded at its tokens, if asked for."""


@dataclass(eq=False)
class Sequence:
    """A response under way."""

    index: int
    prompt: Prompt
    slot: int
    pages: list[int]
    """Its own."""
    tokens: list[int] = field(default_factory=list)
    """Those that the host knows; the device may be some ahead."""
    logprobs: list[float] = field(default_factory=list)
    scored: list[tuple[float, ...]] = field(default_factory=list)
    """What scoring would give of each token; nothing unless it is asked for."""
    drawn: int = 0
    """Tokens drawn, or on their way."""
    ended: bool = False

    @property
    def position(self) -> int:
        """Of its newest token, which the next forward takes in."""
        return len(self.prompt.tokens) + self.drawn - 1


@dataclass(frozen=True)
class Need:
    """Pages that a sequence takes: of its own, and for its prompt once for all that share it."""

    own: int
    prompt: int


def need_of(prompt: Prompt, max_new_tokens: int, page: int) -> Need:
    """Whole pages for the prompt and all response tokens but the last, which no forward takes in."""
    total = pages_for(len(prompt.tokens) + max_new_tokens - 1, page)
    if len(prompt.sequences) == 1:
        return Need(total, 0)
    return Need(total - len(prompt.tokens) // page, pages_for(len(prompt.tokens), page))


def grouped(prompts: List[List[int]]) -> list[Prompt]:
    """Distinct prompts in the order in which they come first."""
    found: dict[tuple[int, ...], Prompt] = {}
    for i, tokens in enumerate(prompts):
        found.setdefault(tuple(tokens), Prompt(list(tokens))).sequences.append(i)
    for prompt in found.values():
        prompt.left = len(prompt.sequences)
    return list(found.values())


def pages_wanted(prompts: List[Prompt], slots: int, max_new_tokens: int, page: int) -> int:
    """Pages with which `slots` sequences need not wait: the largest own needs, and room for twice the prompts that a
    full house has if all its siblings come together. The queue waits in the rare case that it is not enough."""
    needs = [(need_of(p, max_new_tokens, page), len(p.sequences)) for p in prompts]
    own = sorted((n.own for n, count in needs for _ in range(min(count, slots))), reverse=True)[:slots]
    fewest = min(count for _, count in needs)
    shared = sorted((n.prompt for n, _ in needs), reverse=True)[: min(slots, 2 * -(-slots // fewest))]
    return sum(own) + sum(shared)


@dataclass(frozen=True)
class Admission:
    """What has just been let in."""

    sequences: list[Sequence]
    starting: list[tuple[Prompt, int]]
    """Prompts to prefill with the next forward, each with its row in the tables."""
    tails: tuple[list[int], list[int]]
    """Pages to copy, from and to, once those are prefilled."""


class Slots:
    """The queue, the living sequences and their page tables."""

    def __init__(self, prompts: List[Prompt], slots: int, max_new_tokens: int, arena: Arena):
        self.arena, self.count, self.limit = arena, slots, max_new_tokens
        self.queue = [(p, i) for p in reversed(prompts) for i in reversed(p.sequences)]
        self.free = list(range(slots - 1, -1, -1))
        self.living: list[Sequence] = []
        self.prefill = prefill_tokens(arena.stores[0][0].device.type)
        self.grows = arena.pages < pages_wanted(prompts, slots, max_new_tokens, arena.page)
        self.begin_with = min(max_new_tokens, arena.page) if self.grows else max_new_tokens
        """Tokens that a newcomer has pages for."""
        self.prompts = prompts
        self.ended, self.ended_tokens = 0, 0
        self.full = False
        """A newcomer found no room, and nothing was given back since."""
        self.changed = False
        """Whether `tables` was written to; who copies it says when it has."""
        blocks = max(pages_for(len(p.tokens) + max_new_tokens - 1, arena.page) for p in prompts)
        self.tables = torch.zeros(2 * slots, blocks, dtype=torch.int32)
        """Page numbers, on the host: a row for each slot, one for the prompt that starts with it, and a last one of
        the arena's scratch page, if it has one."""
        if arena.scratch is not None:
            self.tables = torch.cat([self.tables, torch.full((1, blocks), arena.scratch, dtype=torch.int32)])

    def admit(self) -> Admission:
        """Let in what fits, in the queue's order."""
        came = Admission([], [], ([], []))
        if self.full or not (self.queue and self.free):
            return came
        prefill, promised, expected = 0, 0, self.begin_with
        if self.grows:
            promised, expected = self._promised(), self._expected()
        while self.queue and self.free:
            prompt, index = self.queue[-1]
            need = need_of(prompt, self.begin_with, self.arena.page)
            new, alone = not prompt.started, not (self.living or came.sequences)
            first = need.own + (need.prompt if new else 0)
            later = max(0, need_of(prompt, expected, self.arena.page).own - need.own)
            if alone and self.grows and first > len(self.arena.free) and self._leave_prompts():
                continue
            if first + (0 if alone else later + promised) > len(self.arena.free):
                self.full = True
                break
            if new and prefill and prefill + len(prompt.tokens) > self.prefill:
                break
            self.queue.pop()
            if new:
                prefill += len(prompt.tokens)
            promised += later
            self._give_slot(prompt, index, need, came)
        self.living.extend(came.sequences)
        return came

    def release(self, sequence: Sequence) -> None:
        """Take back slot and pages of a sequence that has ended; the caller drops it from `living`."""
        prompt = sequence.prompt
        self.free.append(sequence.slot)
        self.arena.give_back(sequence.pages)
        self.full = False
        self.ended, self.ended_tokens = self.ended + 1, self.ended_tokens + len(sequence.tokens)
        prompt.left -= 1
        if not prompt.left:
            self.arena.give_back(prompt.pages)
            prompt.pages, prompt.hidden, prompt.trunk = [], None, None

    def lacks(self, about: List[Sequence]) -> bool:
        """Whether the next forward of these sequences needs more pages than are free."""
        return sum(s.position >= self._room(s) for s in about) > len(self.arena.free)

    def grow(self, about: List[Sequence]) -> list[Sequence]:
        """A page for each of these that has none for its newest token, oldest first. Returns those that had to be put
        back into the queue; they are no longer `living`."""
        put_back: list[Sequence] = []
        for sequence in about:
            while not sequence.ended and sequence.position >= self._room(sequence):
                if self.arena.free:
                    at = self._room(sequence) // self.arena.page
                    sequence.pages += self.arena.take(1)
                    self.tables[sequence.slot, at] = sequence.pages[-1]
                    self.changed = True
                elif len(self.living) > 1:
                    put_back.append(self._put_back(self.living.pop()))
                elif not self._leave_prompts():
                    raise RuntimeError("rollout: the arena has no page for the one sequence that it was made to hold")
        return put_back

    def _room(self, sequence: Sequence) -> int:
        """Tokens that its pages hold."""
        page, prompt = self.arena.page, sequence.prompt
        return (len(prompt.tokens) // page if prompt.pages else 0) * page + len(sequence.pages) * page

    def _expected(self) -> int:
        """Tokens that a sequence has still to draw, if it ends at any of them alike: those drawn so far over the ends
        seen so far."""
        drawn = self.ended_tokens + sum(s.drawn for s in self.living)
        return self.limit if not self.ended else max(1, min(self.limit, -(-drawn // self.ended)))

    def _promised(self) -> int:
        """Pages that the living are expected to take yet."""
        page, more, found = self.arena.page, self._expected(), 0
        for s in self.living:
            known = len(s.prompt.tokens)
            whole = pages_for(min(known + self.limit - 1, known + s.drawn + more), page)
            found += max(0, whole - self._room(s) // page)
        return found

    def _put_back(self, sequence: Sequence) -> Sequence:
        """Take back slot and pages of a living sequence, which waits and starts anew."""
        sequence.ended, self.full = True, False
        self.free.append(sequence.slot)
        self.arena.give_back(sequence.pages)
        if not sequence.prompt.pages:
            sequence.prompt.started = False  # its prompt lay in its own pages
        self.queue.append((sequence.prompt, sequence.index))
        return sequence

    def _leave_prompts(self) -> bool:
        """Take back the pages of shared prompts that no living sequence continues, which are prefilled again later.
        Whether there were any."""
        inhabited, before = {id(s.prompt) for s in self.living}, len(self.arena.free)
        for prompt in self.prompts:
            if prompt.pages and id(prompt) not in inhabited:
                self.arena.give_back(prompt.pages)
                prompt.pages, prompt.started = [], False
        return len(self.arena.free) > before

    def _give_slot(self, prompt: Prompt, index: int, need: Need, came: Admission) -> None:
        sequence = Sequence(index, prompt, self.free.pop(), self.arena.take(need.own))
        if not prompt.started:
            prompt.started, prompt.pages = True, self.arena.take(need.prompt)
            row = sequence.slot + (self.count if prompt.pages else 0)
            self._write(row, prompt.pages)
            came.starting.append((prompt, row))
        full = len(prompt.tokens) // self.arena.page if prompt.pages else 0
        self._write(sequence.slot, prompt.pages[:full] + sequence.pages)
        if len(prompt.pages) > full:
            came.tails[0].append(prompt.pages[full])
            came.tails[1].append(sequence.pages[0])
        came.sequences.append(sequence)

    def _write(self, row: int, pages: list[int]) -> None:
        if pages:
            self.changed = True
            self.tables[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
