"""The data in a pickle of torch.save, read opcode by opcode: no class is imported, no function is called.

The result has plain values, `PickledTensor` for tensors (a description: their bytes are elsewhere in the file) and
`Opaque` for other objects that training checkpoints contain. Time and memory are proportional to the size of the
pickle, whatever it describes: shared objects are never copied, compared or hashed, nesting takes no stack, and a size
in the file reserves no memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from opdkernels.checkpoint.base import MAX_DIMS

MAX_OPCODES = 10_000_000
"""50 for each of 200,000 tensors; torch.save writes 35."""

MAX_INT_BYTES = 8

STORAGE_DTYPES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": None,
}
"""The dtype of the elements by the name of the storage's class; None: bytes of any dtype."""

# Objects without weights that training checkpoints contain: they become `Opaque`, whatever their arguments.
INERT = frozenset(
    {"_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.set", "builtins.frozenset", "builtins.slice"}
    | {
        "torch.device",
        "torch.serialization._get_layout",
        "datetime.datetime",
        "datetime.timedelta",
        "pathlib.PosixPath",
    }
    | {"numpy.dtype", "numpy.ndarray"}
    | {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
)
ARRAYS = frozenset(
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
)
# Classes of sharded tensors: recognised, so that the message can say what the file is.
INERT_PACKAGES = ("torch.distributed.", "torch._C._distributed_c10d.")
MAPPINGS = frozenset({"collections.OrderedDict", "collections.Counter", "collections.defaultdict", "builtins.dict"})
# Globals of Python 2 pickles, with their names today.
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class PickleError(ValueError):
    """The pickle is damaged or describes more than data; the message is a verb phrase about the file."""


class CodeError(PickleError):
    """The pickle names a function or class that is not known to be data; `name` is its dotted name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"runs code ({name[:120]}) when it is loaded")
        self.name = name


class Truncated(PickleError):
    """The pickle continues beyond the given bytes."""


class Global(NamedTuple):
    """A function or class that a pickle names."""

    name: str


class Opaque:
    """An object that is not a tensor, of which only the class is kept."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Storage(NamedTuple):
    """A storage: its key, the torch name of the dtype (None: bytes), its first element and number of elements."""

    key: str
    dtype: str | None
    start: int
    numel: int


class PickledTensor(NamedTuple):
    """The description of a tensor: `kind` is its class, or what else makes it not a plain tensor."""

    kind: str
    storage: Storage | None
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Pickle(NamedTuple):
    """What a pickle contains: its value, the position after it, the dtype of each storage, and all tensors."""

    value: Any
    end: int
    storages: dict[str, str | None]
    tensors: list[PickledTensor]


def read_pickle(data: bytes, start: int = 0, *, plain: bool = False) -> Pickle:
    """Reads one pickle of protocol 2 to 5.

    Args:
        data: Bytes that contain the pickle.
        start: Its first byte.
        plain: Refuses objects other than tensors, numbers, texts and collections of these, and keys that are neither
            text nor small integers: what is left is safe to unpickle.

    Returns:
        The content.

    Raises:
        CodeError: It names a function or class that is not known to be data.
        Truncated: `data` ends before the pickle does.
        PickleError: It is damaged, or uses what state dicts do not need.

    Examples:
        >>> import pickle
        >>> read_pickle(pickle.dumps({"step": 3, "betas": (0.9, 0.99)}, 2)).value
        {'step': 3, 'betas': (0.9, 0.99)}
    """
    reader = _Reader(data, start, plain)
    try:
        return Pickle(reader.run(), reader.position, reader.storages, reader.tensors)
    except PickleError:
        raise
    except (IndexError, struct.error):
        if reader.position >= len(data):
            raise Truncated("is truncated within its pickle") from None
        raise PickleError("has a damaged pickle (an operand is missing)") from None
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError):
        raise PickleError("has a damaged pickle (an operand is invalid)") from None


class _Reader:
    """The stack machine of pickle, for data only."""

    def __init__(self, data: bytes, start: int, plain: bool) -> None:
        self.data, self.position, self.plain = data, start, plain
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.storages: dict[str, str | None] = {}
        self.tensors: list[PickledTensor] = []

    def run(self) -> Any:
        if self.data[self.position] != 0x80:
            raise PickleError("has no pickle of protocol 2 or later")
        for _ in range(MAX_OPCODES):
            code = self.data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.marks:
                    raise PickleError("has a damaged pickle (objects are left over)")
                return self.stack.pop()
            step = OPCODES[code]
            if step is None:
                raise PickleError(f"has a pickle with the opcode {code:#04x}, which state dicts do not need")
            step(self)
        raise PickleError(f"has a pickle of more than {MAX_OPCODES} opcodes, the limit")

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self.position + size
        if end > len(self.data):
            self.position = len(self.data)
            raise Truncated("is truncated within its pickle")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, size: int) -> int:
        """The next `size` bytes as an unsigned integer."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 4096)
        if end < 0:
            if self.position + 4096 > len(self.data):
                self.position = len(self.data)
                raise Truncated("is truncated within its pickle")
            raise PickleError("has a damaged pickle (a name has no end)")
        text = self.data[self.position : end].decode()
        self.position = end + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)
        if self.plain and isinstance(value, Opaque):
            raise PickleError(f"has {value.kind[:120]}, which is neither a tensor, a number nor text")

    def pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    # One method per opcode, or per group of opcodes.

    def proto(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            raise PickleError(f"has a pickle of protocol {version}")

    def frame(self) -> None:
        self.number(8)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def duplicate(self) -> None:
        self.push(self.stack[-1])

    def put(self, size: int) -> None:
        """Memoizes the top; positions follow each other, as pickle writes them."""
        position = self.number(size)
        if position < len(self.memo):
            self.memo[position] = self.stack[-1]
        elif position <= len(self.memo) + 1:  # Python 2 begins with 1
            self.memo += [None] * (position - len(self.memo)) + [self.stack[-1]]
        else:
            raise PickleError(f"has a damaged pickle (position {position} of its memo after {len(self.memo)})")

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def get(self, size: int) -> None:
        self.push(self.memo[self.number(size)])

    def signed(self, size: int) -> None:
        """An integer; longer ones than those of a size or a step are kept by name only."""
        content = self.take(size)
        is_long = size > MAX_INT_BYTES + 1
        self.push(Opaque("a large integer") if is_long else int.from_bytes(content, "little", signed=True))

    def floating(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def python2_text(self, size: int) -> None:
        self.push(self.take(size).decode("latin-1"))

    def bytestring(self, size: int) -> None:
        self.take(size)
        self.push(Opaque("bytes"))

    def append(self) -> None:
        self.extend([self.stack.pop()])

    def appends(self) -> None:
        self.extend(self.pop_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target += values
        elif not isinstance(target, Opaque):
            raise PickleError("has a damaged pickle (it appends to no list)")

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def setitems(self) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        """Sets items of a dictionary: pairs of key and value, flattened.

        Keys that are no text are replaced by objects that are hashed by identity: numbers and tuples can be chosen so
        that hashing them takes time without end.
        """
        target = self.stack[-1]
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("has a damaged pickle (it sets items of no dictionary)")
        for i in range(0, len(items), 2):
            key = items[i]
            if self.plain and type(key) is not str and not (type(key) is int and 0 <= key < 1 << 31):
                raise PickleError(f"has {_describe_key(key)} as a key, which is neither text nor a small integer")
            target[key if type(key) is str else Opaque(_describe_key(key))] = items[i + 1]

    def discard_items(self) -> None:
        self.pop_mark()
        if not isinstance(self.stack[-1], Opaque):
            raise PickleError("has a damaged pickle (it adds to no set)")

    def frozenset(self) -> None:
        self.pop_mark()
        self.push(Opaque("frozenset"))

    def marked_tuple(self) -> None:
        self.push(tuple(self.pop_mark()))

    def short_tuple(self, size: int) -> None:
        values = tuple(self.stack[-size:])
        if len(values) < size:
            raise PickleError("has a damaged pickle (a tuple is incomplete)")
        del self.stack[-size:]
        self.push(values)

    def find_global(self) -> None:
        self.push(_checked(f"{self.line()}.{self.line()}"))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("has a damaged pickle (a name is no text)")
        self.push(_checked(f"{module}.{name}"))

    def persistent(self) -> None:
        storage = _storage(self.stack.pop())
        self.storages.setdefault(storage.key, storage.dtype)
        self.push(storage)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        value = _build(function, arguments)
        if isinstance(value, PickledTensor):
            self.tensors.append(value)
        elif self.plain and isinstance(value, dict) and value:
            raise PickleError("has a dictionary made of pairs, which torch.save does not write")
        self.push(value)

    def build(self) -> None:
        """Attributes: those of an OrderedDict, such as `_metadata`, and of opaque objects hold no weights."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (dict, Opaque)):
            raise PickleError("has a pickle that sets the state of an object, which state dicts do not need")


def _opcodes() -> list[Callable[[_Reader], None] | None]:
    table: list[Callable[[_Reader], None] | None] = [None] * 256
    R = _Reader
    steps: dict[int | bytes, Callable[[_Reader], None]] = {
        0x80: R.proto,
        0x95: R.frame,
        b"(": R.mark,
        b"0": R.pop,
        b"1": lambda r: (r.pop_mark(), None)[1],
        b"2": R.duplicate,
        b"q": lambda r: r.put(1),
        b"r": lambda r: r.put(4),
        0x94: R.memoize,
        b"h": lambda r: r.get(1),
        b"j": lambda r: r.get(4),
        b"N": lambda r: r.push(None),
        0x88: lambda r: r.push(True),
        0x89: lambda r: r.push(False),
        b"J": lambda r: r.signed(4),
        b"K": lambda r: r.push(r.number(1)),
        b"M": lambda r: r.push(r.number(2)),
        0x8A: lambda r: r.signed(r.number(1)),
        0x8B: lambda r: r.signed(r.number(4)),
        b"G": R.floating,
        b"X": lambda r: r.text(r.number(4)),
        0x8C: lambda r: r.text(r.number(1)),
        0x8D: lambda r: r.text(r.number(8)),
        b"U": lambda r: r.python2_text(r.number(1)),
        b"T": lambda r: r.python2_text(r.number(4)),
        b"C": lambda r: r.bytestring(r.number(1)),
        b"B": lambda r: r.bytestring(r.number(4)),
        0x8E: lambda r: r.bytestring(r.number(8)),
        0x96: lambda r: r.bytestring(r.number(8)),
        b"]": lambda r: r.push([]),
        b"a": R.append,
        b"e": R.appends,
        b"}": lambda r: r.push({}),
        b"s": R.setitem,
        b"u": R.setitems,
        0x8F: lambda r: r.push(Opaque("set")),
        0x90: R.discard_items,
        0x91: R.frozenset,
        b")": lambda r: r.push(()),
        b"t": R.marked_tuple,
        0x85: lambda r: r.short_tuple(1),
        0x86: lambda r: r.short_tuple(2),
        0x87: lambda r: r.short_tuple(3),
        b"c": R.find_global,
        0x93: R.stack_global,
        b"Q": R.persistent,
        b"R": R.call,
        0x81: R.call,
        b"b": R.build,
    }
    for code, step in steps.items():
        table[code if isinstance(code, int) else code[0]] = step
    return table


OPCODES = _opcodes()


def _describe_key(key: Any) -> str:
    """A dictionary key that is no text, for messages."""
    return repr(key) if type(key) in (int, float, bool) else f"a {type_name(key)}"


def type_name(value: Any) -> str:
    """The class of a value, for messages.

    >>> type_name({}), type_name(Opaque("numpy.ndarray"))
    ('dict', 'numpy.ndarray')
    """
    if isinstance(value, PickledTensor):
        return value.kind
    return value.kind if isinstance(value, Opaque) else type(value).__name__


def _checked(name: str) -> Global:
    """A global by its dotted name. Raises CodeError unless it is known to be data."""
    module, _, rest = name.partition(".")
    name = f"{RENAMED.get(module, module)}.{rest}"
    owner, _, last = name.rpartition(".")
    known = (
        name in INERT
        or name in ARRAYS
        or name in MAPPINGS
        or name in REBUILD
        or name.startswith(INERT_PACKAGES)
        or (last in STORAGE_DTYPES and owner in ("torch", "torch.cuda", "torch.storage"))
        or _dtype(name) is not None
        or name in ("torch.Size", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
        or (owner == "torch" and last.startswith(("per_tensor_", "per_channel_")))
    )
    if not known:
        raise CodeError(name)
    return Global(name)


def _dtype(name: str) -> str | None:
    """The torch dtype with a dotted name, such as "bfloat16"; None if there is none."""
    import torch

    owner, _, last = name.rpartition(".")
    return last if owner == "torch" and isinstance(torch.__dict__.get(last), torch.dtype) else None


def _storage(identity: Any) -> Storage:
    """The storage of a persistent id: ("storage", class, key, device, number of elements[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise PickleError("refers to an object outside of the pickle that is no storage")
    _, storage_class, key, _, numel, *view = identity
    if not isinstance(storage_class, Global) or type(key) is not str or not _is_size(numel):
        raise PickleError("has a damaged pickle (a storage is invalid)")
    start = 0
    if view and view[0] is not None:  # files from before torch 0.4: a part of another storage
        _, start, numel = view[0]
        if not _is_size(start) or not _is_size(numel):
            raise PickleError("has a damaged pickle (the view of a storage is invalid)")
    return Storage(key, STORAGE_DTYPES[storage_class.name.rpartition(".")[2]], start, numel)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMS or not all(map(_is_size, values)):
        raise PickleError(f"describes a tensor whose sizes are not up to {MAX_DIMS} integers")
    return tuple(values)


def _dtype_of(value: Any) -> str:
    dtype = _dtype(value.name) if isinstance(value, Global) else None
    if dtype is None:
        raise PickleError("describes a tensor without a dtype")
    return dtype


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> PickledTensor:
    """Versions 1 and 2: the dtype is that of the storage. `rest`: requires_grad, hooks, metadata."""
    return _described(storage, storage.dtype or "uint8", offset, size, stride, rest[2:])


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *metadata: Any
) -> PickledTensor:
    """Version 3: the storage is bytes, of a dtype that has no class of storage."""
    return _described(storage, _dtype_of(dtype), offset, size, stride, metadata)


def _described(
    storage: Any, dtype: str, offset: Any, size: Any, stride: Any, metadata: tuple[Any, ...]
) -> PickledTensor:
    if not isinstance(storage, Storage) or not _is_size(offset):
        raise PickleError("describes a tensor without a storage")
    shape, strides = _sizes(size), _sizes(stride)
    if len(shape) != len(strides):
        raise PickleError("describes a tensor with other numbers of sizes and strides")
    flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    lazy = flags.get("conj") is True or flags.get("neg") is True
    return PickledTensor("lazy" if lazy else "Tensor", storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _rebuild_other(kind: str) -> Callable[..., PickledTensor]:
    return lambda *arguments: PickledTensor(kind, None, "", 0, (), ())


def _rebuild_wrapper_subclass(tensor_class: Any, *rest: Any) -> PickledTensor:
    name = tensor_class.name if isinstance(tensor_class, Global) else "a subclass"
    return _rebuild_other(name.rpartition(".")[2])()


def _rebuild_from_type(function: Any, tensor_class: Any, arguments: Any, state: Any = None) -> Any:
    if not isinstance(function, Global) or function.name == FROM_TYPE or not isinstance(tensor_class, Global):
        raise PickleError("has a damaged pickle (a tensor of an unknown class)")
    tensor = _build(function, arguments)
    name = tensor_class.name.rpartition(".")[2]
    if not isinstance(tensor, PickledTensor):
        raise PickleError("has a damaged pickle (a tensor is rebuilt by what gives none)")
    return tensor._replace(kind=name) if name not in ("Tensor", "Parameter", "Buffer") else tensor


FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_wrapper_subclass": _rebuild_wrapper_subclass,
    "torch._utils._rebuild_qtensor": _rebuild_other("quantised"),
    "torch._utils._rebuild_sparse_tensor": _rebuild_other("sparse"),
    "torch._utils._rebuild_nested_tensor": _rebuild_other("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_other("meta"),
    "torch._utils._rebuild_device_tensor_from_numpy": _rebuild_other("a tensor of another device"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _rebuild_other("a tensor of another device"),
    FROM_TYPE: _rebuild_from_type,
}


def _build(function: Any, arguments: Any) -> Any:
    """What a known function gives for its arguments, as a description."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise PickleError("has a damaged pickle (it calls what is no function)")
    name = function.name
    if name in REBUILD:
        return REBUILD[name](*arguments)
    if name in MAPPINGS:
        return _mapping(arguments)
    if name == "torch.Size":
        return _sizes(arguments[0])
    if name in ARRAYS:
        return Opaque("numpy.ndarray")
    if name in INERT or name.startswith(INERT_PACKAGES):
        return Opaque(name.removeprefix("builtins."))
    raise PickleError(f"has a pickle that calls {name[:120]}, which state dicts do not need")


def _mapping(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """A dictionary; the only argument is a list of pairs, as Python 2 writes it, or a class of default values."""
    items = arguments[0] if arguments and isinstance(arguments[0], list) else []
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in items):
        raise PickleError("has a damaged pickle (a dictionary of no pairs)")
    return {key if type(key) is str else Opaque(_describe_key(key)): value for key, value in items}
