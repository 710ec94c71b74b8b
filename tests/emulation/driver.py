"""Triton's launches, handed to the emulator: its own launcher, above a `libcuda.so.1` that is `stub.c`.

A process needs the environment that `environment` makes, and calls `install` before the first launch.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .machine import Machine
from .memory import UNWRITTEN
from .ptx import Program, parse

HERE = Path(__file__).parent
LIBRARY = "libcuda.so.1"
PARAMETER_BYTES = {"u64": 8, "s64": 8, "b64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}


def why_not() -> str | None:
    """Why there can be no emulation here, or None."""
    if sys.platform != "linux":
        return "the emulator stands in for Linux's libcuda.so.1"
    if find_spec("triton") is None:
        return "triton is not installed"
    if shutil.which("cc") is None:
        return "no C compiler (cc) for the stub of libcuda"
    return None


def environment(folder: Path) -> dict[str, str]:
    """For a process that emulates: this one's, with the stub, which is compiled into `folder` unless it is there, and
    Triton's cache in it. Several processes may use a folder at the same time."""
    triton = find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LIBRARY).exists():
        mine = folder / f"{LIBRARY}.{os.getpid()}"
        include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
        command = [
            "cc",
            "-shared",
            "-fPIC",
            f"-I{include}",
            f"-Wl,-soname,{LIBRARY}",
            "-o",
            mine,
            HERE / "stub.c",
        ]
        subprocess.run(command, check=True)
        mine.rename(folder / LIBRARY)
    without = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LD_LIBRARY_PATH")}
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return without | {
        "LD_LIBRARY_PATH": ":".join(paths),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }


class Emulator:
    """What the launches of this process run on.

    tensors: by name, those that kernels find through tables of addresses; a launch may touch these and its arguments.
    mutation: what is done to the PTX of a module before it runs.
    cooperative: names of kernels that are launched as cooperative ones.
    compiled: kernel → the PTX that was last launched, before it was mutated.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.tensors: dict[str, torch.Tensor] = {}
        self.mutation: Callable[[str], str] | None = None
        self.cooperative: set[str] = set()
        self.compiled: dict[str, str] = {}
        self.error: BaseException | None = None
        self.callbacks: tuple[Any, ...] = ()  # what the stub calls; it holds no reference to them
        self._modules: list[str] = []
        self._programs: dict[str, Program] = {}

    def load(self, text: str) -> int:
        """A handle, not 0."""
        self._modules.append(text)
        return len(self._modules)

    def program(self, handle: int) -> Program:
        text = self._modules[handle - 1]
        if self.mutation is not None:
            text = self.mutation(text)
        if text not in self._programs:
            self._programs[text] = parse(text)
        return self._programs[text]

    def launch(
        self, handle: int, grid: int, threads: int, shared: int, cooperative: int, parameters: Any
    ) -> int:
        """0, or 1 after an error, which is kept."""
        try:
            program = self.program(handle)
            assert threads == program.threads
            values = [
                ctypes.string_at(parameters[i], PARAMETER_BYTES[type_])
                for i, type_ in enumerate(program.parameters.values())
            ]
            self.compiled[program.name] = self._modules[handle - 1]
            self.machine.launch(program, grid, shared, values, cooperative=bool(cooperative))
        except BaseException as error:
            self.error = error
            return 1
        return 0

    def register(self, arguments: Mapping[str, object]) -> None:
        """Let the next launch touch the tensors among its arguments, and `tensors`."""
        self.machine.memory.clear()
        for name, tensor in [*_tensors_in(arguments), *self.tensors.items()]:
            self.machine.memory.add(name, tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _tensors_in(values: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            fields = getattr(value, "_fields", range(len(value)))
            yield from _tensors_in(
                {f"{name}.{field}": member for field, member in zip(fields, value, strict=True)}
            )


def install() -> Emulator:
    """From here on Triton compiles for an H100 and launches on the emulator, with tensors on the CPU. Kernels are not
    assembled: the stub is given their PTX. `torch.empty` marks float32 memory as unwritten."""
    from triton.backends.nvidia import compiler, driver
    from triton.runtime import driver as active

    emulator = Emulator(Machine())
    library = ctypes.CDLL(LIBRARY)
    callbacks = (
        ctypes.CFUNCTYPE(ctypes.c_ulonglong, ctypes.c_char_p)(lambda text: emulator.load(text.decode())),
        ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_ulonglong,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_void_p),
        )(emulator.launch),
    )
    library.stub_set_callbacks(*callbacks)
    emulator.callbacks = callbacks

    class Launcher(driver.CudaLauncher):
        """Tells the emulator which tensors a launch may touch, and raises what it found."""

        def __init__(self, src: Any, metadata: Any) -> None:
            super().__init__(src, metadata)
            self.names: list[str] = list(src.fn.arg_names)
            self.kernel: str = src.fn.__name__

        def __call__(self, *arguments: Any) -> None:
            self.launch_cooperative_grid = self.kernel in emulator.cooperative
            emulator.register(dict(zip(self.names, arguments[-len(self.names) :], strict=True)))
            try:
                super().__call__(*arguments)
            except RuntimeError:
                error, emulator.error = emulator.error, None
                if error is not None:
                    raise error from None
                raise

    class Driver(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils = driver.CudaUtils()
            self.launcher_cls = Launcher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

    compiler.CUDABackend.make_cubin = lambda self, src, *_: src.encode()
    active.set_active(Driver())

    empty = torch.empty

    def marked_empty(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*arguments, **options)
        if tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() > 0:
            tensor.view(torch.int32).fill_(UNWRITTEN)
        return tensor

    torch.empty = marked_empty
    return emulator
