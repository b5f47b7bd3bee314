"""Compiles a CUDA file to PTX with NVRTC: the only compiler from PyPI that still targets sm_70.

Usage: nvrtc.py --toolkit DIR --arch 70 KERNEL.cu OUT.ptx   (DIR: see tools/install-nvcc.sh --sm70)
Prints the compiler's words; exit code 0 on success, 1 where the kernel does not compile.
"""

import argparse
import ctypes
import pathlib
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toolkit", type=pathlib.Path, required=True)
    parser.add_argument("--arch", default="70")
    parser.add_argument("-D", dest="defines", action="append", default=[])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()

    library = args.toolkit / "lib" / "libnvrtc.so.12"
    if not library.exists():
        print(f"nvrtc.py: {library} is missing: run tools/install-nvcc.sh --sm70", file=sys.stderr)
        return 1
    # NVRTC looks for its builtins by name only; loading them first lets it find these.
    for builtins in (args.toolkit / "lib").glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))

    def check(status: int, call: str) -> None:
        if status:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise SystemExit(f"nvrtc.py: {call}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    program = ctypes.c_void_p()
    source = args.source.read_bytes()
    name = str(args.source).encode()
    check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None),
        "nvrtcCreateProgram",
    )
    options = [
        f"--gpu-architecture=compute_{args.arch}",
        "--std=c++17",
        "--device-as-default-execution-space",
        f"--include-path={args.source.resolve().parent}",
        f"--include-path={args.toolkit / 'include'}",
        *[f"-D{define}" for define in args.defines],
    ]
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)

    size = ctypes.c_size_t()
    check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
    log = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
    # That NVRTC will drop sm_70, it says every time; that is why it is this old.
    lines = [line for line in log.value.decode(errors="replace").splitlines()
             if line.strip() and "are deprecated and may be removed" not in line]
    if lines:
        print("\n".join(lines), file=sys.stderr)
    check(status, "nvrtcCompileProgram")

    check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)), "nvrtcGetPTXSize")
    ptx = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetPTX(program, ptx), "nvrtcGetPTX")
    args.out.write_bytes(ptx.value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
