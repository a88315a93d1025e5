"""Record the kernels that some operators start, and start them again with other pointers.

Between two calls with inputs of the same shapes, strides, types and alignment nothing changes but where the inputs,
the results and the memory in between are: the same compiled kernels run, on the same grids, with the same numbers.
Where the numbers of tokens differ but not their ``jit.room``, the argument ``t`` of each kernel changes too.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .jit import check_device, is_persistent, leading, room

_ALIGN = 256
_MOST_MAPS = 4096


class Place(NamedTuple):
    """Where a pointer points: ``offset`` bytes behind pointer ``source``: of inputs, then results, then workspace."""

    source: int
    offset: int


class Start(NamedTuple):
    """A kernel that was started: the compiled variant, its grid, all its arguments, and which is the number of tokens."""

    compiled: Any
    grid: tuple[int, ...]
    args: list[Any]
    tokens: int | None = None


class Recorder:
    """Listens to ``jit.launch`` and ``jit.empty`` while operators run on ``inputs``, which have different addresses.

    moving: those of the inputs that have a row for each of ``tokens`` tokens; 0 if their rows differ.
    """

    def __init__(self, inputs: Sequence[Tensor], moving: Sequence[int] = (), tokens: int = 0) -> None:
        self._inputs, self._moving, self._tokens = list(inputs), moving, tokens
        self._blocks: list[Tensor] = []  # kept, so that no two have one address
        self._starts: list[Start] = []

    def allocated(self, tensor: Tensor) -> None:
        """``tensor`` is new memory of an operator."""
        self._blocks.append(tensor)

    def launched(
        self, compiled: Any, grid: tuple[int, ...], args: list[Any], tokens: int | None
    ) -> None:
        """A kernel was started. tokens: which of ``args`` may be their number."""
        if tokens is not None and (not self._tokens or args[tokens] != self._tokens):
            tokens = None
        self._starts.append(Start(compiled, grid, args, tokens))

    def serves_room(self, results: Sequence[Tensor]) -> bool:
        """Whether the recording is right for any number of tokens that has the same ``jit.room``: every kernel is told the
        number, none has a descriptor of an input's rows, of which there are no more than tokens, and what operators
        allocate, and have descriptors of, has a row for each that there is room for."""
        spans = [_span(self._inputs[i]) for i in self._moving]
        blocks, rows = [_span(block) for block in self._blocks], room(self._tokens)
        made = [x.shape[0] for x in self._blocks if x.numel()]
        made += [
            x.shape[0]
            for start in self._starts
            for x in start.args
            if _is_descriptor(x) and _find(_span(x), blocks)  # type: ignore[arg-type]
        ]
        return self._tokens > 0 and min(made, default=rows) >= rows and all(
            start.tokens is not None
            and not any(_is_descriptor(x) and _find(_span(x), spans) for x in start.args)  # type: ignore[arg-type]
            for start in self._starts
        ) and all(result.shape[0] in (0, self._tokens) for result in results)  # fmt: skip

    def finish(self, results: Sequence[Tensor]) -> "Replay | None":
        """The recording; None if anything but these kernels took part, as where an operator fell back to PyTorch."""
        inputs, count = [_span(x) for x in self._inputs], len(self._inputs)
        blocks = [_span(block) for block in self._blocks]
        made = [_block_of(result, blocks) for result in results]
        if not self._starts or None in made or len(set(made)) < len(made):
            return None
        written: set[int] = set()
        life: dict[int, tuple[int, int]] = {}  # block -> first and last start that sees it
        found: list[dict[int, tuple[bool, int, int]]] = []  # slot -> (whether a block, which, offset)
        for number, start in enumerate(self._starts):
            slots = {}
            for slot, argument in enumerate(start.args):
                span = _span(argument)
                if span is None or span[0] == 0:
                    continue
                block, given = _find(span, blocks), _find(span, inputs)
                if block is not None:
                    slots[slot] = True, *block
                    life[block[0]] = life.get(block[0], (number, number))[0], number
                    written.add(block[0])
                elif given is not None:
                    slots[slot] = False, *given
                elif not is_persistent(span[0]):
                    return None
            found.append(slots)
        if not written.issuperset(made):
            return None
        sizes = {i: (*life[i], blocks[i][1] - blocks[i][0]) for i in life if i not in made}  # type: ignore[index]
        offsets, workspace = _pack(sizes)

        def place(is_block: bool, index: int, offset: int) -> Place:
            if not is_block:
                return Place(index, offset)
            if index in made:
                return Place(count + made.index(index), offset)
            return Place(count + len(made), offsets[index] + offset)

        launches = [
            Launch(start, {slot: place(*where) for slot, where in slots.items()})
            for start, slots in zip(self._starts, found, strict=True)
        ]
        shapes = [
            (
                tuple(self._blocks[block].shape),  # type: ignore[index]
                None if result.shape[0] == self._tokens else result.shape[0],
                result.dtype,
            )
            for block, result in zip(made, results, strict=True)
        ]
        return Replay(launches, shapes, workspace, results[0].device)


class Replay:
    """A recording. ``run`` starts its kernels on the current stream. Results: shape of the memory, rows (None: one for
    each token), type."""

    def __init__(
        self,
        launches: "list[Launch]",
        results: list[tuple[tuple[int, ...], int | None, torch.dtype]],
        workspace: int,
        device: torch.device,
    ) -> None:
        self._launches, self._results = launches, results
        self._workspace, self._device = workspace, device

    def run(self, pointers: list[int], tokens: int) -> list[Tensor]:
        """``pointers``: addresses of the inputs, which have a row for each of ``tokens``. Returns the results.
        RuntimeError if the recording was made on another GPU than the current one."""
        results = [torch.empty(shape, dtype=d, device=self._device) for shape, _, d in self._results]
        check_device(results[0].get_device())
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=self._device)
        every = [*pointers, *[result.data_ptr() for result in results], workspace.data_ptr()]
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for launch in self._launches:
            launch.run(stream, every, tokens)
        return [
            leading(result, tokens if rows is None else rows)
            for result, (_, rows, _) in zip(results, self._results, strict=True)
        ]


class Launch:
    """One kernel of a recording, and where each of its pointers comes from."""

    def __init__(self, start: Start, places: dict[int, Place]) -> None:
        grid = (*start.grid, 1, 1)[:3]
        self._call, self._args, descriptor = _direct(start.compiled, grid) or _public(
            start.compiled, grid
        )
        self._tokens: int | None = None
        self._pointers: list[tuple[int, int, int]] = []
        self._maps: list[tuple[int, int, int, Callable[[Any], list[Any]], Encoded]] = []
        seen = 0
        for slot, argument in enumerate(start.args):
            at, place = len(self._args), places.get(slot)
            if _is_descriptor(argument):
                make, kind = descriptor(argument, seen)
                seen += 1
                self._args += make(_Address(argument.base.data_ptr()))  # a tensor would stay in memory
                if place is not None:
                    self._maps.append((at, *place, make, _encoded(kind, argument)))
                continue
            if slot == start.tokens:
                self._tokens = at
            pointer = isinstance(argument, Tensor)
            self._args.append(argument.data_ptr() if pointer else argument)
            if pointer and place is not None:
                self._pointers.append((at, *place))

    def run(self, stream: int, pointers: list[int], tokens: int) -> None:
        """Start it."""
        args = self._args.copy()
        if self._tokens is not None:
            args[self._tokens] = tokens
        for at, source, offset in self._pointers:
            args[at] = pointers[source] + offset
        for at, source, offset, make, known in self._maps:
            pointer = pointers[source] + offset
            ready = known.get(pointer)
            if ready is None:
                if len(known) >= _MOST_MAPS:
                    known.clear()
                ready = known[pointer] = make(_Address(pointer))[0]
            args[at] = ready
        self._call(stream, args)


class Encoded(dict[int, Any]):
    """Address -> a descriptor, ready for the launcher."""


_ENCODED: WeakValueDictionary[Any, Encoded] = WeakValueDictionary()


def _encoded(kind: Any, like: Any) -> Encoded:
    """Those of one kind, shared by recordings: a layer's weights are where they were for any number of tokens."""
    layout, padding = getattr(like, "layout", None), getattr(like, "padding", None)
    box = tuple(like.block_shape), like.base.dtype, id(layout), padding
    return _ENCODED.setdefault((kind, tuple(like.shape), tuple(like.strides), *box), Encoded())


class _Address:
    """What a launcher wants of a tensor: where it is."""

    def __init__(self, at: int) -> None:
        self._at = at

    def data_ptr(self) -> int:
        return self._at


Maker = tuple[Callable[[Any], list[Any]], Any]
"""What makes a descriptor's arguments for the memory at an address, and what else than the descriptor they depend on."""


def _public(compiled: Any, grid: tuple[int, ...]) -> tuple[Any, list[Any], Any]:
    """(call, first arguments, function to a descriptor's Maker) through Triton's own way to start a kernel."""
    run = compiled[grid]

    def descriptor(argument: Any, _: int) -> Maker:
        known = _with_base(argument, None)
        return (lambda base: [_with_base(known, base)]), None

    return lambda stream, args: run(*args, stream=stream), [], descriptor


def _direct(compiled: Any, grid: tuple[int, ...]) -> tuple[Any, list[Any], Any] | None:
    """As ``_public``, for the launcher that Triton 3.6 generates in C; None where there is another.

    Its Python parts take longer than the launch: above all they encode each descriptor anew.
    """
    found = _c_launcher(compiled)
    if found is None:
        return None
    start, metas, encode, fixed = found

    def call(stream: int, args: list[Any]) -> None:
        args[3] = stream
        start(*args)

    def descriptor(argument: Any, number: int) -> Maker:
        known, meta = _with_base(argument, None), metas[number] if metas else None
        return (lambda base: list(encode(_with_base(known, base), meta))), str(meta)

    return call, [*grid, None, *fixed], descriptor


@cache
def _c_launcher(compiled: Any) -> tuple[Any, Any, Any, list[Any]] | None:
    """(C function, its descriptors' metadata, what encodes one, arguments after the stream); looked up once: it is slow."""
    try:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        launcher = compiled.run
        start, metas = launcher.launch, None
        if inspect.isfunction(start):
            inside = inspect.getclosurevars(start).nonlocals
            start, metas = inside["launcher"], inside["tensordesc_meta"]
        scratch = launcher.global_scratch_size or launcher.profile_scratch_size
        if (
            not inspect.isbuiltin(start)
            or scratch
            or len(inspect.signature(make_tensordesc_arg).parameters) != 2
        ):
            return None
        fixed = [compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl]
        fixed += [None, None, compiled.packed_metadata, None, None, None]
    except (ImportError, AttributeError, KeyError):
        return None
    return start, metas, make_tensordesc_arg, fixed


def _with_base(descriptor: Any, base: Any) -> Any:
    """A copy that describes other memory."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__, base=base)
    return made


def _is_descriptor(argument: Any) -> bool:
    return hasattr(argument, "block_shape")


def _span(argument: Any) -> tuple[int, int] | None:
    """First address and end of what a tensor or a descriptor can reach; None for anything else."""
    if _is_descriptor(argument):
        at = argument.base.data_ptr()
        return at, at + argument.shape[0] * argument.strides[0] * argument.base.element_size()
    if not isinstance(argument, Tensor):
        return None
    last = sum((n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True))
    at = argument.data_ptr()
    return at, at + (last + 1) * argument.element_size() * (argument.numel() > 0)


def apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two reach the same memory: then an address says which of them a kernel was given."""
    spans = sorted(_span(x) for x in tensors if x.numel())  # type: ignore[type-var]
    return all(one[1] <= other[0] for one, other in pairwise(spans))  # type: ignore[index]


def _find(span: tuple[int, int], among: Sequence[Any]) -> tuple[int, int] | None:
    """(index, offset) of the one among those spans that holds ``span``."""
    for index, (at, end) in enumerate(among):
        if at <= span[0] < end and span[1] <= end:
            return index, span[0] - at
    return None


def _block_of(result: Tensor, blocks: Sequence[Any]) -> int | None:
    """The block whose first rows ``result`` is."""
    at = result.data_ptr()
    if not at or not result.is_contiguous():
        return None
    return next((index for index, block in enumerate(blocks) if block[0] == at), None)


def _pack(blocks: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets of blocks {name: (first use, last use, bytes)} and the bytes of all; blocks used at one time are apart."""
    offsets: dict[int, int] = {}
    for name, (first, last, size) in sorted(blocks.items(), key=lambda item: -item[1][2]):
        taken = sorted(
            (offsets[other], offsets[other] + blocks[other][2])
            for other in offsets
            if blocks[other][0] <= last and first <= blocks[other][1]
        )
        at = 0
        for begin, end in taken:
            if at + size <= begin:
                break
            at = max(at, -(-end // _ALIGN) * _ALIGN)
        offsets[name] = at
    return offsets, max((offsets[name] + blocks[name][2] for name in offsets), default=0)
