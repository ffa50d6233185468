"""A pretended machine with two CUDA devices, for tests on a CPU.

CUDA_VISIBLE_DEVICES says which of them a process sees, as with real ones.

Within `pretended()` every tensor keeps its numbers on the CPU and carries a device of its own. A
TorchFunctionMode sees each call that Python makes into torch and refuses what CUDA refuses: tensors
of two devices in one call, .numpy() of a device's, oneDNN's operators, a generator of the CPU's,
and in deterministic mode what has no deterministic kernel. Copies into pinned memory arrive late:
NaN lies there until the stream that brings them has been waited for. So do copies to a device over
a stream of their own, and what is written there over that stream; they read their pinned source
when they arrive, so whoever wrote into it meanwhile is seen. What makes the host wait is counted,
by the line that does.

Real numbers flow, so code that depends on data runs to its end. Not seen: what C++ does by itself
(fused kernels; gradients go with any device while a backward pass runs), types that a device lacks,
memory, speed, and the order of sums.
"""

import collections
import contextlib
import os
import sys
import types
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

N_DEVICES = 2
CPU = torch.device("cpu")
WAITS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "bincount",
    "unique",
    "masked_select",
    "equal",
    "allclose",
    "__contains__",
    "__array__",
    "numpy",
}
CROSSING = {
    "copy_",
    "_has_compatible_shallow_copy_type",
    "is_same_size",
    "expand_as",
    "view_as",
    "reshape_as",
    "result_type",
    "set_",
    "is_set_to",
}
VIEWS = {
    "t",
    "view",
    "flatten",
    "reshape",
    "detach",
    "values",
    "expand",
    "transpose",
    "squeeze",
    "unsqueeze",
    "permute",
    "size",
    "dim",
    "crow_indices",
    "col_indices",
    "numel",
    "stride",
    "is_floating_point",
    "is_complex",
    "requires_grad_",
    "__len__",
    "narrow",
    "backward",
    "untyped_storage",
    "data_ptr",
    "is_contiguous",
    "element_size",
    "storage_offset",
    "__hash__",
    "unbind",
    "chunk",
}
# these refuse on CUDA in deterministic mode, as do:
NOT_DETERMINISTIC = {"median", "nanmedian", "kthvalue", "histc", "put_"}
IF_FLOATING = {"cumsum", "cumsum_"}


def visible_devices():
    """Numbers of the machine's devices that this process sees."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(range(N_DEVICES)) if text is None else [int(n) for n in text.split(",") if n]


class Refused(RuntimeError):
    """What PyTorch would refuse with a real CUDA device."""


def _storage(tensor):
    with torch._C.DisableTorchFunction():
        return (
            tensor.values() if tensor.layout in (torch.sparse_csr, torch.sparse_csc) else tensor
        ).untyped_storage()


def mark(tensor, device):
    _storage(tensor).pretended = device
    return tensor


def known_device(tensor):
    """The device that a tensor was seen on; None of one that C++ made, or that is older than the
    mode."""
    return getattr(_storage(tensor), "pretended", None)


def device_of(tensor):
    return known_device(tensor) or CPU


def _in_backward():
    return torch._C._current_graph_task_id() != -1


class PretendedCuda(TorchFunctionMode):
    """The mode. `waits`: Counter of (line of the caller, function) that made the host wait;
    `launches`: calls on a device."""

    def __init__(self):
        super().__init__()
        self.visible = visible_devices()
        self.current, self.launches = 0, 0
        self.waits = collections.Counter()
        # of each device (target, value): copies on their way to pinned memory
        self.coming = [[] for _ in range(N_DEVICES)]
        self.side: Stream | None = None  # the stream that `torch.cuda.stream` made the current one

    # Devices

    def whole(self, device):
        """A device with its number, as PyTorch completes `cuda`."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return device
        number = self.current if device.index is None else device.index
        if number >= len(self.visible):
            raise Refused("CUDA error: invalid device ordinal")
        return torch.device("cuda", number)

    def set_device(self, device):
        # refuses "cuda" as the real one does
        self.current = self.whole(torch.cuda._utils._get_device_index(device)).index

    def arrive(self, number, copies=None):
        """Let copies of a device arrive, all by default."""
        with torch._C.DisableTorchFunction():
            for each in list(self.coming[number]) if copies is None else copies:
                if any(each is other for other in self.coming[number]):
                    each[0].copy_(each[1])
                    self.coming[number] = [
                        other for other in self.coming[number] if other is not each
                    ]

    def waited(self, device, name):
        self.arrive(device.index)
        frame = sys._getframe(1)
        while "site-packages" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.waits[f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}", name] += 1

    # Calls

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name == "__get__":
            return self._attribute(func, args)
        if name == "__set__":
            if (
                func.__self__.__name__ == "grad"
                and isinstance(args[1], torch.Tensor)
                and device_of(args[1]) != device_of(args[0])
            ):
                raise Refused("grad: assigned from another device")
            return func(*args)
        if name in ("to", "cuda", "cpu"):
            return self._moved(name, args, kwargs)
        if name == "pin_memory" or (name == "is_pinned"):
            return (
                self._pinned(args[0].clone())
                if name == "pin_memory"
                else getattr(_storage(args[0]), "pinned", False)
            )
        asked, pin = None, kwargs.pop("pin_memory", False)
        if kwargs.get("device") is not None:
            asked, kwargs["device"] = (
                self.whole(kwargs["device"]),
                CPU if self._real(kwargs["device"]) else kwargs["device"],
            )
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self._refuse(func, name, args, kwargs, tensors, asked)
        if name == "copy_":
            return self._copied(*args, **kwargs)
        if name == "index_copy_" and self.side is not None:
            return self._written_late(*args)
        device = asked or self._common(name, args, tensors)
        if device and device.type == "cuda":
            self.launches += name not in VIEWS
            if name in WAITS or self._by_mask(name, args):
                self.waited(device, name)
        out = func(*args, **kwargs)
        if device and asked != torch.device("meta"):
            tree_map_only(torch.Tensor, lambda t: t if known_device(t) else mark(t, device), out)
        return self._pinned(out) if pin else out

    @staticmethod
    def _real(device):
        return torch.device(device).type in ("cpu", "cuda") if not isinstance(device, int) else True

    @staticmethod
    def _pinned(tensor):
        _storage(tensor).pinned = True
        return mark(tensor, CPU)

    @staticmethod
    def _attribute(func, args):
        name, owner = func.__self__.__name__, args[0]
        if isinstance(owner, torch.Tensor) and owner.device.type == "cpu":
            if name == "device":
                return device_of(owner)
            if name in ("is_cuda", "is_cpu"):
                return (device_of(owner).type == "cuda") == (name == "is_cuda")
        out = func(*args)
        if isinstance(out, torch.Tensor) and not known_device(out) and known_device(owner):
            mark(out, known_device(owner))  # .grad, above all
        return out

    def _moved(self, name, args, kwargs):
        """`to`, `cuda` and `cpu`: a copy where the device changes."""
        tensor, rest, source = args[0], list(args[1:]), device_of(args[0])
        target = {"cuda": self.whole("cuda"), "cpu": CPU, "to": source}[name]
        if isinstance(kwargs.get("device"), (str, int, torch.device)):
            rest.insert(0, kwargs.pop("device"))
        for i, value in enumerate(rest):
            if isinstance(value, (str, torch.device)) or (
                isinstance(value, int) and not isinstance(value, bool) and name == "to"
            ):
                target = self.whole(value)
                rest[i] = CPU if target.type == "cuda" else value
            elif isinstance(value, torch.Tensor):
                target = device_of(value)
        out = tensor.to(*rest, **kwargs) if name == "to" else tensor
        if target == source or target.type == "meta":
            return out if _storage(out) is _storage(tensor) else mark(out, target)
        if target.type == "cuda":
            if self.side is not None and kwargs.get("non_blocking") and _is_pinned(tensor):
                with torch._C.DisableTorchFunction():
                    late = mark(_poison(torch.empty_like(out)), target)
                self.side.later(late, lambda: late.copy_(tensor), tensor)
                return late
            return mark(out.clone() if _storage(out) is _storage(tensor) else out, target)
        if kwargs.get("non_blocking"):  # PyTorch takes pinned memory for it
            return self._copied(
                self._pinned(torch.empty_like(out)), mark(out.clone(), source), non_blocking=True
            )
        self.waited(source, name)
        return mark(out.clone() if _storage(out) is _storage(tensor) else out, CPU)

    def _written_late(self, target, dim, index, source):
        """`index_copy_` over a stream that others have to wait for."""
        with torch._C.DisableTorchFunction():
            lost = _poison(torch.empty_like(source))
            target.index_copy_(dim, self.side.value_of(index), lost)
        self.side.later(target, lambda: target.index_copy_(dim, index, source), source)
        return target

    def _copied(self, target, source, non_blocking=False):
        """`copy_`, which may cross devices, and be late where its target is pinned."""
        here, there = (
            device_of(target),
            device_of(source) if isinstance(source, torch.Tensor) else CPU,
        )
        if here.type == "cpu" and there.type == "cuda":
            if non_blocking and getattr(_storage(target), "pinned", False):
                self.coming[there.index].append((target, source.clone()))
                return target.fill_(float("nan") if target.is_floating_point() else -1)
            self.waited(there, "copy_")
        return target.copy_(source)

    def _refuse(self, func, name, args, kwargs, tensors, asked):
        if not any(device.type == "cuda" for device in (asked or CPU, *map(device_of, tensors))):
            return
        if name in ("numpy", "__array__") and not kwargs.get("force"):
            raise Refused(f"can't convert {device_of(tensors[0])} device type tensor to numpy")
        if "mkldnn" in (resolve_name(func) or ""):
            raise Refused(f"{name}: oneDNN has no kernel for CUDA tensors")
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise Refused(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
        if torch.are_deterministic_algorithms_enabled() and (
            (name in NOT_DETERMINISTIC and len(args) + len(kwargs) > 1)
            or (name in IF_FLOATING and args[0].is_floating_point())
            or (name == "bincount" and len(tensors) > 1)
        ):
            raise Refused(f"{name} does not have a deterministic implementation")

    def _common(self, name, args, tensors):
        """The one device of a call's tensors; a scalar of the CPU's goes with any, and its indices
        with a tensor on CUDA."""
        if name in ("__getitem__", "__setitem__", "index_put_"):
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
            if device_of(args[0]) == CPU and any(device_of(t) != CPU for t in indices):
                raise Refused(
                    f"{name}: indices should be on cpu or on the same device as the indexed "
                    f"tensor (cpu)"
                )
            others = [t for t in tensors if t is not args[0] and not any(t is i for i in indices)]
            if name == "__getitem__" or not indices:
                others = [t for t in others if t.dim() == 0]  # copies into slices may cross
            tensors = [args[0], *others, *(t for t in indices if device_of(t) != CPU)]
        devices = {known_device(t) if _in_backward() else device_of(t) for t in tensors} - {None}
        if len(devices) > 1 and name not in CROSSING:
            sized = {
                device_of(t)
                for t in tensors
                if t.dim() and not (_in_backward() and not known_device(t))
            }
            if len(sized) > 1 or (sized == {CPU} and len(devices) > 1) or len(devices - {CPU}) > 1:
                raise Refused(
                    f"{name}: Expected all tensors to be on the same device, but found "
                    f"{', '.join(sorted(map(str, devices)))}"
                )
        return (
            next((device for device in devices if device.type == "cuda"), next(iter(devices), None))
            if tensors
            else CPU
        )

    @staticmethod
    def _by_mask(name, args):
        """Whether a tensor is indexed by flags, of which the host must know how many are set."""
        return name in ("__getitem__", "__setitem__") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1])
        )


def _is_pinned(tensor):
    return getattr(_storage(tensor), "pinned", False)


def _poison(tensor):
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


class Stream:
    """The current stream of a device, on which everything is done at once."""

    def __init__(self, mode, device):
        self.mode, self.device = mode, device

    def synchronize(self):
        self.mode.waited(self.device, "synchronize")

    def wait_stream(self, other):
        if isinstance(other, SideStream):
            other.run()

    def copies(self):
        return list(self.mode.coming[self.device.index])

    def arrive(self, copies):
        self.mode.arrive(self.device.index, copies)


class SideStream(Stream):
    """A stream of its own: what is done over it happens when it is waited for, in order."""

    def __init__(self, mode, device):
        super().__init__(mode, device)
        self.waiting = []  # [(target, what is done, source)]

    def later(self, target, act, source):
        self.waiting.append((target, act, source))

    def value_of(self, tensor):
        """What a tensor will hold that is on its way."""
        return next((source for target, _, source in self.waiting if target is tensor), tensor)

    def run(self, until=None):
        """Do what waits, or only what is among `until`."""
        with torch._C.DisableTorchFunction():
            while self.waiting and (until is None or any(self.waiting[0] is u for u in until)):
                self.waiting.pop(0)[1]()

    def copies(self):
        return list(self.waiting)

    def arrive(self, copies):
        self.run(copies)


@contextlib.contextmanager
def pretended():
    """The machine; gives its PretendedCuda. Import libraries such as transformers before, which
    look for CUDA when they load."""
    mode = PretendedCuda()

    class Event:
        """Comes when the work that its stream had at `record` is done; the current device's stream
        by default."""

        def record(self, stream=None):
            self.stream = stream or mode.side or current_stream()
            self.copies, self.asked = self.stream.copies(), 0

        def synchronize(self):
            self.stream.arrive(self.copies)

        def query(self):
            """Not yet, for the first times."""
            self.asked += 1
            if self.asked > 4:
                self.synchronize()
            return self.asked > 4

    def current_stream(device=None):
        return Stream(mode, mode.whole("cuda" if device is None else device))

    @contextlib.contextmanager
    def on_stream(stream):
        before, mode.side = mode.side, stream
        yield
        mode.side = before

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: len(mode.visible),
        "set_device": mode.set_device,
        "Event": Event,
        "current_device": lambda: mode.current,
        "current_stream": current_stream,
        "Stream": lambda device=None: SideStream(mode, mode.whole(device or "cuda")),
        "stream": on_stream,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=None: types.SimpleNamespace(
            name="pretended",
            total_memory=80 << 30,
            uuid=f"GPU-{mode.visible[mode.whole('cuda' if device is None else device).index]}",
        ),
        "synchronize": lambda device=None: current_stream(device).synchronize(),
    }
    by_type = torch._C._group_tensors_by_device_and_dtype

    def by_device_and_type(lists, *more):
        found = by_type(lists, *more)
        devices = {device_of(t) for each in lists for t in each if t is not None}
        assert len(devices) == 1, devices
        return {(next(iter(devices)), kind): groups for (_, kind), groups in found.items()}

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", by_device_and_type)
        )
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mode)
        yield mode
