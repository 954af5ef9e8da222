"""Run prompts through a backend without scheduler or cache: for training, the GPU's warm-up, benchmarks and tests.

Every sequence gets pages of its own and keeps them until it ends; each step takes what all open sequences have to
compute, within the token limits. Nobody waits for an answer's tokens: they stay in the backend's state.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from shoplm.batch import RowOutput
from shoplm.engine.builder import build_batch
from shoplm.model.backend import Backend
from shoplm.request import Explain, Generate, Request, SelectOutput, Service, Task, token_ids
from shoplm.scheduler.admission import Limits
from shoplm.scheduler.cost import StepLoad
from shoplm.scheduler.plan import Plan, PlanRow
from shoplm.scheduler.rows import next_level, next_tokens
from shoplm.scheduler.sequence import Sequence

Output = tuple[int, ...] | tuple[float, ...] | SelectOutput


class DirectRunner:
    """Owns all pages and state slots of a backend that nobody else uses."""

    def __init__(
        self,
        backend: Backend,
        *,
        chunk_tokens: int = 2048,
        step_tokens: int = 2048,
        free_pages: Seq[int] | None = None,
    ) -> None:
        """`chunk_tokens` bounds one prompt's part of a step, `step_tokens` the step (single tokens and beams aside).
        `free_pages` is the order in which pages are handed out; all, ascending, where it is not given."""
        self._backend = backend
        self._chunk_tokens = chunk_tokens
        self._step_tokens = step_tokens
        info = backend.info
        self._page_size = info.page_size
        self._limits = Limits(info.max_context_tokens, info.trie_depths, backend.lanes)
        self._free_pages = list(range(info.pages) if free_pages is None else free_pages)[::-1]
        self._free_slots = list(range(info.state_slots))[::-1]

    def run(self, work: Seq[tuple[Seq[int], Task]]) -> list[Output]:
        """Outputs in order: token ids for Generate, items for Select, values for Predict, the hidden state for Embed.

        Starts as many as there are pages and state slots for, the rest as others end. Raises what the backend raises,
        and ValueError for work that never fits. `stop_token_ids` end an answer and are not part of it.
        """
        sequences = [
            self._limits.sequence(Request(str(index), Service.PREDICTION, token_ids(tokens), task, 0.0))
            for index, (tokens, task) in enumerate(work)
        ]
        waiting, running = sequences[::-1], list[Sequence]()
        outputs: dict[Sequence, Output] = dict.fromkeys(sequences, ())
        while waiting or running:
            while waiting and self._start(waiting[-1]):
                running.append(waiting.pop())
            if not running:
                request_id = waiting[-1].request.request_id
                raise ValueError(f"work {request_id} needs more pages or state slots than the backend has")
            plan = self._plan(running)
            results = self._backend.submit(build_batch(plan, self._page_size)).result().outputs
            computed = (*plan.answers, *(row.sequence for row in plan.rows))
            for sequence, result in zip(computed, results, strict=True):
                if result is not None:
                    outputs[sequence] = _take(sequence, outputs[sequence], result)
            for sequence in running:
                if sequence.ended:
                    self._stop(sequence)
            running = [sequence for sequence in running if not sequence.ended]
        return [outputs[sequence] for sequence in sequences]

    def _start(self, sequence: Sequence) -> bool:
        """Give it all pages that it will ever need and a state slot; False where they are short."""
        tokens = max(sequence.prompt_length, sequence.most_length - 1)  # an answer's last one is never read
        linear, beams = (-(-count // self._page_size) for count in (tokens, sequence.beam_tokens))
        if not self._free_slots or linear + beams > len(self._free_pages):
            return False
        sequence.state_slot = self._free_slots.pop()
        sequence.page_table = token_ids(self._free_pages.pop() for _ in range(linear))
        sequence.beam_pages = [self._free_pages.pop() for _ in range(beams)]
        return True

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.state_slot is not None
        self._free_slots.append(sequence.state_slot)
        self._free_pages += (*sequence.page_table, *sequence.beam_pages)

    def _plan(self, running: Seq[Sequence]) -> Plan:
        """All beams, all answers, and of the prompts as much as the limits allow, in the order of their start."""
        rows: list[PlanRow] = []
        answers: list[Sequence] = []
        starts: list[int] = []
        budget = self._step_tokens
        for sequence in running:
            if sequence.level:
                rows.append(next_level(sequence))
            elif not sequence.is_prompt:
                answers.append(sequence)
                starts.append(sequence.computed)
                sequence.computed += 1
                sequence.unknown += 1
            elif size := min(sequence.pending, self._chunk_tokens, budget):
                rows.append(next_tokens(sequence, size))
                budget -= size
        tokens = len(answers) + sum(row.count for row in rows)
        return Plan(tuple(rows), tuple(answers), tuple(starts), load=StepLoad(tokens, 0, len(answers) + len(rows)))


def _take(sequence: Sequence, before: Output, result: RowOutput) -> Output:
    """A sequence's output with a step's result; what has ended is marked so."""
    task = sequence.request.task
    if isinstance(task, Generate):
        assert isinstance(result, int) and isinstance(before, tuple)
        stopped = result in task.stop_token_ids
        output = before if stopped else (*before, result)
        sequence.ended = stopped or len(output) == task.max_tokens
        return output
    if isinstance(task, Explain):
        assert isinstance(result, tuple) and isinstance(before, tuple)
        sequence.ended = not sequence.is_prompt
        return (*before, *result)
    assert isinstance(result, SelectOutput | tuple)
    sequence.ended = True
    return result
