#!/usr/bin/env python3
"""Answers questions about a Hopper GPU that decide how kernels are written, in less than a minute.

  python3 tools/gpu_probe.py [--out FILE]
  python3 tools/gpu_probe.py --compile-only     # assembles for sm_90a: needs NVRTC and no GPU
  python3 tools/gpu_probe.py --self-test        # the model of the tensor core: needs neither

Needs the standard library, libcuda and NVRTC (`REDRAFT_NVRTC_DIR`, a CUDA toolkit, or the Python package
nvidia-cuda-nvrtc). Changes no setting of the GPU. Prints one JSON object:

  bits          elements in which two ways of a 64 x n x 256 bf16 product differ: mma.sync m16n8k16, wgmma with 8 and
                with 64 columns, and a model of the tensor core's arithmetic; and their largest error
  gap_us        a kernel of one warp in a graph of 512: launched plainly, and with programmatic dependent launch
  fence_us      216 CTAs of which the last of each group sums: __threadfence, and fence.acq_rel
  histogram_us  one CTA, n values into 8 x 256 bins of 64 bits: 64-bit atomics, and two 32-bit ones with carry
  row_us        one CTA that reads n logits with a ban mask: one at a time, and four at a time
  l2_gb_s       528 CTAs that read 24 MB again and again

A question that cannot be answered has {"error": reason} in its place, and the exit code is 1.
"""

import argparse
import array
import ctypes as C
import glob
import json
import os
import random
import struct
import sys
from pathlib import Path

ARCH = "sm_90a"
ROWS, DEPTH = 64, 256  # of the products of `bits`
STEP = 16  # products that the tensor core sums at once
FRACTION_BITS = 25
ROW_LENGTHS = (50256, 126464)  # about the vocabularies of GPT-2 and LLaDA; multiples of four


class Unanswered(Exception):
    """Why a question has no answer."""


# ---- the tensor core ----


def rounded_bf16(value):
    """The bits of the bf16 next to a float, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def integer_and_exponent(bits, fraction):
    """A float's bits as (m, e) with value = m * 2^e, for formats of 8 exponent bits and `fraction` fraction bits. Finite."""
    sign, exponent, mantissa = bits >> 8 + fraction, bits >> fraction & 0xFF, bits & (1 << fraction) - 1
    mantissa |= (exponent > 0) << fraction
    return (-mantissa if sign else mantissa), max(exponent, 1) - 127 - fraction


def cut(value, shift):
    """value * 2^shift, cut toward zero."""
    if shift >= 0:
        return value << shift
    return -(-value >> -shift) if value < 0 else value >> -shift


def tensor_core(left, right):
    """One element of a product as the tensor core of sm_90 sums it, as a float. `left`, `right`: bf16 bits, a multiple of 16.

    [MMA-Sim] 16 products and the accumulator are summed at once: each is cut toward zero to a multiple of 2^-25 of the
    largest exponent among them, where a product's exponent is the sum of its factors' exponents, and the sum is cut
    toward zero to the 24 bits of an f32.
    """
    total, scale = 0, 0
    for k in range(0, len(left), STEP):
        terms, top = [], None
        for a, b in zip(left[k : k + STEP], right[k : k + STEP]):
            (ma, ea), (mb, eb) = integer_and_exponent(a, 7), integer_and_exponent(b, 7)
            if ma and mb:
                terms.append((ma * mb, ea + eb))
                # 1.x * 2^e is an integer of 8 bits times 2^(e - 7).
                exponent = ea + eb + abs(ma).bit_length() + abs(mb).bit_length() - 2
                top = exponent if top is None else max(top, exponent)
        if total:
            terms.append((total, scale))
            exponent = scale + abs(total).bit_length() - 1
            top = exponent if top is None else max(top, exponent)
        if top is None:
            continue
        scale = top - FRACTION_BITS
        total = sum(cut(value, exponent - scale) for value, exponent in terms)
        excess = abs(total).bit_length() - 24
        if excess > 0:
            total, scale = cut(total, -excess), scale + excess
    return float(total) * 2.0**scale


def self_test():
    """The model on sums whose result is known; the decoding of floats against the interpreter's own."""
    one, tiny = rounded_bf16(1.0), rounded_bf16(2.0**-26)

    def pad(bits):
        return bits + [0] * (-len(bits) % STEP)

    cases = [
        ("exact", pad([one] * 5), pad([rounded_bf16(3.0)] * 5), 15.0),
        ("nothing", [0] * STEP, [one] * STEP, 0.0),
        ("cut below 2^-25", pad([one, tiny, tiny]), pad([one] * 3), 1.0),
        ("kept at 2^-25 and cut in the result", pad([one] + [rounded_bf16(2.0**-25)] * 3), pad([one] * 4), 1.0),
        ("carried into the 24 bits", pad([one] + [rounded_bf16(2.0**-25)] * 4), pad([one] * 5), 1.0 + 2.0**-23),
        ("toward zero on both sides", pad([rounded_bf16(-1.0), tiny]), pad([one, one]), -1.0),
        ("steps follow each other", [one] * 32, [one] * 32, 32.0),
        # 2.25 = 1.5 * 1.5 has the exponent 0 of its factors, so 2^-25 is not cut, and eight of them
        # are one unit of the result.
        ("exponents of factors", pad([rounded_bf16(1.5)] + [rounded_bf16(2.0**-25)] * 8), pad([rounded_bf16(1.5)] + [one] * 8), 2.25 + 2.0**-22),
    ]
    for name, left, right, expected in cases:
        found = tensor_core(left, right)
        assert found == expected, f"{name}: expected {expected!r}, found {found!r}"
    for value in (0.0, 1.0, -1.0, 3.140625, 2.0**-126, -(2.0**100)):
        mantissa, exponent = integer_and_exponent(rounded_bf16(value), 7)
        assert mantissa * 2.0**exponent == value, value
    assert [cut(-5, -1), cut(5, -1), cut(-5, 1)] == [-2, 2, -10]
    return f"{len(cases)} sums"


# ---- libraries ----


def compiler():
    """NVRTC, opened behind its built-ins."""
    named = os.environ.get("REDRAFT_NVRTC_DIR")
    toolkits = glob.glob("/usr/local/cuda*/lib64") + glob.glob("/usr/local/cuda*/targets/*/lib")
    bases = [*sys.path, *glob.glob("/opt/*/.venv/lib/python3*/site-packages"), *glob.glob("/usr/local/lib/python3*/*-packages")]
    packages = [place for base in bases for place in glob.glob(f"{base}/nvidia/*/lib")]
    for place in [*([named] if named else []), *sorted(toolkits, reverse=True), *sorted(packages, reverse=True)]:
        library = sorted(glob.glob(f"{place}/libnvrtc.so.[0-9]*"))
        builtins = sorted(glob.glob(f"{place}/libnvrtc-builtins.so.[0-9]*"))
        if library and builtins:
            C.CDLL(builtins[-1], mode=C.RTLD_GLOBAL)
            return C.CDLL(library[-1], mode=C.RTLD_GLOBAL)
    raise Unanswered("no NVRTC: set REDRAFT_NVRTC_DIR to the directory that holds libnvrtc")


def compiled(nvrtc):
    """(cubin, the assembler's report) of the kernels."""
    source = (Path(__file__).resolve().parent / "gpu_probe.cu").read_bytes()
    program, size = C.c_void_p(), C.c_size_t()

    def text(name):
        getattr(nvrtc, f"nvrtcGet{name}Size")(program, C.byref(size))
        bytes_ = C.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{name}")(program, bytes_)
        return bytes_

    nvrtc.nvrtcCreateProgram(C.byref(program), source, b"gpu_probe.cu", 0, None, None)
    options = [f"--gpu-architecture={ARCH}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (C.c_char_p * len(options))(*options))
    log = text("ProgramLog").value.decode()
    if code:
        raise Unanswered(f"gpu_probe.cu does not compile:\n{log}")
    return text("CUBIN"), log


class LaunchAttribute(C.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = [("id", C.c_int), ("padding", C.c_char * 4), ("value", C.c_int * 16)]


class LaunchConfig(C.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        ("grid_and_block", C.c_uint * 6),
        ("shared_bytes", C.c_uint),
        ("stream", C.c_void_p),
        ("attributes", C.POINTER(LaunchAttribute)),
        ("num_attributes", C.c_uint),
    ]


PROGRAMMATIC_STREAM_SERIALIZATION = 6


class Gpu:
    """The first device, one stream, one module."""

    def __init__(self, cubin):
        try:
            self.library = C.CDLL("libcuda.so.1")
        except OSError as error:
            raise Unanswered(f"no CUDA driver: {error}") from None
        device, context = C.c_int(), C.c_void_p()
        self.stream, self.module = C.c_void_p(), C.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", C.byref(device), 0)
        name = C.create_string_buffer(100)
        self.call("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode()
        self.call("cuDevicePrimaryCtxRetain", C.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", C.byref(self.stream), 1)
        self.call("cuModuleLoadData", C.byref(self.module), cubin)

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code:
            raise Unanswered(f"{name}: CUDA error {code}")

    def memory(self, data):
        """A copy of bytes or of an array on the device."""
        data, address = bytes(data), C.c_uint64()
        self.call("cuMemAlloc_v2", C.byref(address), C.c_size_t(len(data)))
        self.call("cuMemcpyHtoD_v2", address, data, C.c_size_t(len(data)))
        return address

    def words(self, address, count):
        """32-bit words, once all launches before are done."""
        data = C.create_string_buffer(4 * count)
        self.call("cuStreamSynchronize", self.stream)
        self.call("cuMemcpyDtoH_v2", data, address, C.c_size_t(4 * count))
        return struct.unpack(f"<{count}I", data.raw)

    def launch(self, name, grid, block, *arguments, dependent=False):
        function = C.c_void_p()
        self.call("cuModuleGetFunction", C.byref(function), self.module, name.encode())
        pointers = (C.c_void_p * len(arguments))(*[C.cast(C.pointer(argument), C.c_void_p) for argument in arguments])
        if not dependent:
            self.call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, self.stream, pointers, None)
            return
        attribute = LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        shape = (C.c_uint * 6)(grid, 1, 1, block, 1, 1)
        config = LaunchConfig(shape, 0, self.stream, C.pointer(attribute), 1)
        self.call("cuLaunchKernelEx", C.byref(config), function, pointers, None)

    def microseconds(self, launch, count):
        """Of one launch in a graph of `count`, the best of eight runs."""
        graph, runnable, start, end = (C.c_void_p() for _ in range(4))
        elapsed, best = C.c_float(), float("inf")
        launch()
        self.call("cuStreamSynchronize", self.stream)
        self.call("cuStreamBeginCapture_v2", self.stream, 2)
        for _ in range(count):
            launch()
        self.call("cuStreamEndCapture", self.stream, C.byref(graph))
        self.call("cuGraphInstantiateWithFlags", C.byref(runnable), graph, C.c_ulonglong(0))
        for event in (start, end):
            self.call("cuEventCreate", C.byref(event), 0)
        for _ in range(8):
            self.call("cuEventRecord", start, self.stream)
            self.call("cuGraphLaunch", runnable, self.stream)
            self.call("cuEventRecord", end, self.stream)
            self.call("cuEventSynchronize", end)
            self.call("cuEventElapsedTime", C.byref(elapsed), start, end)
            best = min(best, elapsed.value)
        return round(best * 1e3 / count, 3)


# ---- the questions ----


def zeros(count):
    return array.array("I", bytes(4 * count))


def bits(gpu):
    draw = random.Random(1)
    left, right = ([[rounded_bf16(draw.gauss(0.0, 1.0)) for _ in range(DEPTH)] for _ in range(ROWS)] for _ in range(2))
    a, b = (gpu.memory(array.array("H", [value for row in rows for value in row])) for rows in (left, right))
    found = {}
    for kernel, columns in (("mma", 8), ("mma", 64), ("wgmma", 8), ("wgmma", 64)):
        out = gpu.memory(array.array("I", [0x7FC00000]) * (ROWS * columns))
        if kernel == "mma":
            gpu.launch("product_mma", 1, 128, a, b, out, C.c_int(columns))
        else:
            gpu.launch(f"product_wgmma{columns}", 1, 128, a, b, out)
        found[f"{kernel}{columns}"] = gpu.words(out, ROWS * columns)
    modelled = [tensor_core(row, column) for row in left for column in right]
    wide = [[value_of(bits_ << 16) for bits_ in row] for row in left + right]
    exact = [sum(x * y for x, y in zip(row, column)) for row in wide[:ROWS] for column in wide[ROWS:]]

    def first_columns(words):
        return [word for row in range(ROWS) for word in words[64 * row : 64 * row + 8]]

    def differ(x, y):
        return sum(p != q for p, q in zip(x, y))

    def worst(words):
        return max(abs(value_of(word) - sum_) for word, sum_ in zip(words, exact))

    return {
        "of": ROWS * 64,
        "mma8 and mma64": differ(found["mma8"], first_columns(found["mma64"])),
        "wgmma8 and mma8": differ(found["wgmma8"], found["mma8"]),
        "wgmma64 and mma64": differ(found["wgmma64"], found["mma64"]),
        "model and mma64": sum(value_of(word) != value for word, value in zip(found["mma64"], modelled)),
        "model and wgmma64": sum(value_of(word) != value for word, value in zip(found["wgmma64"], modelled)),
        "largest error of mma64": worst(found["mma64"]),
        "largest error of wgmma64": worst(found["wgmma64"]),
    }


def value_of(word):
    return struct.unpack("<f", struct.pack("<I", word))[0]


def gaps(gpu):
    p = gpu.memory(zeros(1024))
    return {
        "plain": gpu.microseconds(lambda: gpu.launch("tick", 1, 32, p), 512),
        "dependent": gpu.microseconds(lambda: gpu.launch("tick_dependent", 1, 32, p, dependent=True), 512),
    }


def fences(gpu):
    partials, counters = gpu.memory(zeros(1024 * 64 * 4)), gpu.memory(zeros(128))
    kinds = ("sequential", "acquire_release")
    return {kind: gpu.microseconds(lambda: gpu.launch(f"fence_{kind}", 216, 64, partials, counters), 256) for kind in kinds}


def rows_of(gpu, kinds, prefix, second):
    """Microseconds of `prefix_kind` over rows of both lengths; `second` makes its second argument."""
    draw, times = random.Random(2), {}
    for length in ROW_LENGTHS:
        row = gpu.memory(array.array("f", [draw.random() ** 8 for _ in range(length)]))
        other, out = second(length), gpu.memory(zeros(8192))
        for kind in kinds:
            arguments = (row, other, C.c_int(length)) if prefix == "histogram" else (row, other, out, C.c_int(length))
            times[f"{kind} {length}"] = gpu.microseconds(lambda: gpu.launch(f"{prefix}_{kind}", 1, 512, *arguments), 64)
    return times


def histograms(gpu):
    return rows_of(gpu, ("wide", "carry"), "histogram", lambda _: gpu.memory(zeros(2 * 8 * 256)))


def rows(gpu):
    return rows_of(gpu, ("scalar", "vector"), "row", lambda length: gpu.memory(zeros(length // 32 + 8)))


def l2(gpu):
    size, rounds = 24 << 20, 16
    data, out = gpu.memory(random.Random(3).randbytes(size)), gpu.memory(zeros(4))
    us = gpu.microseconds(lambda: gpu.launch("read_l2", 528, 512, data, out, C.c_int(size // 16), C.c_int(rounds)), 4)
    return round(rounds * size / us / 1e3)


QUESTIONS = {"bits": bits, "gap_us": gaps, "fence_us": fences, "histogram_us": histograms, "row_us": rows, "l2_gb_s": l2}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="assemble the kernels and print registers and spills")
    parser.add_argument("--self-test", action="store_true", help="test the model of the tensor core")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")
    args = parser.parse_args()
    if args.self_test:
        print(f"gpu_probe: {self_test()}")
        return 0
    try:
        cubin, log = compiled(compiler())
        if args.compile_only:
            words = ("Compiling", "registers", "spill")
            print("\n".join(line for line in log.splitlines() if any(word in line for word in words)))
            return 0
        gpu = Gpu(cubin)
    except Unanswered as error:
        print(f"gpu_probe: {error}", file=sys.stderr)
        return 1
    answers = {"device": gpu.name}
    for name, question in QUESTIONS.items():
        try:
            answers[name] = question(gpu)
        except Unanswered as error:
            answers[name] = {"error": str(error)}
    text = json.dumps(answers, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")
    failed = [name for name, answer in answers.items() if isinstance(answer, dict) and "error" in answer]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
