"""Builds llama.cpp's programs and libraries for this machine, from PyPI's llama-cpp-python."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

VERSION = "0.3.36"
TARGETS = ("llama", "llama-bench", "llama-diffusion-cli")
# -O3 by the build type, -march=native by GGML_NATIVE; no server, no network, no tests.
FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_BUILD_TESTS=OFF",
         "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_MTMD=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF")


def fetched(directory):
    """The unpacked sdist below a directory, through pip where it is not there yet."""
    sdist = directory / f"llama_cpp_python-{VERSION}"
    if not sdist.exists():
        archive = directory / f"{sdist.name}.tar.gz"
        if not archive.exists():
            # Of this package alone the source: what builds its metadata comes as wheels.
            subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", directory, f"llama-cpp-python=={VERSION}"], check=True)
        with tarfile.open(archive) as files:
            files.extractall(directory, filter="data")
    return sdist


def build(directory, jobs):
    for program in ("cmake", "c++"):
        if not shutil.which(program):
            raise SystemExit(f"--build-llama: no {program} on PATH; get it by: {'pip install cmake' if program == 'cmake' else 'apt-get install g++'}")
    directory.mkdir(parents=True, exist_ok=True)
    source = fetched(directory) / "vendor" / "llama.cpp"
    place = directory / "build"
    subprocess.run(["cmake", "-S", source, "-B", place, *FLAGS], check=True)
    subprocess.run(["cmake", "--build", place, "--parallel", str(jobs), "--target", *TARGETS], check=True)
    print(f"built: {place / 'bin'}; compare by: tools/compare/run llama --llama {directory}")


def main(directory):
    """What is half built goes on when it is asked for again."""
    try:
        build(pathlib.Path(directory), os.cpu_count() or 1)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"--build-llama: {error.cmd[0]} ended with code {error.returncode}; what it said stands above") from None
