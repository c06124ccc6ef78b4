"""Times forwards of llama.cpp with the logits of every row, or writes such logits or greedy tokens.

  python tools/compare/children/llama_decode.py --model FILE.gguf --forward 128@0,4@64 --threads 2

ROWS@POSITION: ROWS rows from POSITION on, over cached K/V of the positions before. Attention is not
causal (`--causal` for autoregressive files): a row sees all that is cached and all rows beside it,
as a block of a diffusion model does. llama-bench computes the logits of the last row alone; here
`llama_decode` gives those of all, and nothing is drawn. Prints one JSON object.

Needs the ctypes bindings of llama-cpp-python on PYTHONPATH, and LLAMA_CPP_LIB_PATH. Only the module
of bindings is loaded, so what its package imports beside it is not needed. Flash attention and the
type of K/V (f16) are llama.cpp's defaults, in checks too: what is checked is what is timed.
"""

import argparse
import ctypes
import importlib
import json
import pathlib
import statistics
import sys
import time
import types


def bindings():
    """`llama_cpp.llama_cpp` without `llama_cpp/__init__.py`, which imports packages of its own."""
    for place in sys.path:
        folder = pathlib.Path(place) / "llama_cpp"
        if (folder / "llama_cpp.py").exists():
            package = types.ModuleType("llama_cpp")
            package.__path__ = [str(folder)]
            sys.modules["llama_cpp"] = package
            return importlib.import_module("llama_cpp.llama_cpp")
    raise SystemExit("no llama_cpp on PYTHONPATH: expected the unpacked sdist of llama-cpp-python")


class Decoder:
    def __init__(self, llama, o, positions, rows):
        self.llama = llama
        # The log goes nowhere; the callback must outlive every call.
        self.silent = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self.silent, None)
        llama.llama_backend_init()
        wanted = llama.llama_model_default_params()
        wanted.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(o.model).encode(), wanted)
        if not self.model:
            raise SystemExit(f"{o.model}: llama.cpp does not load it")
        context = llama.llama_context_default_params()
        context.n_ctx = -(-positions // 256) * 256
        context.n_batch = context.n_ubatch = max(rows, 512)  # one forward, not several
        context.n_threads = context.n_threads_batch = o.threads
        self.context = llama.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit(f"{o.model}: llama.cpp makes no context of {context.n_ctx} positions")
        llama.llama_set_causal_attn(self.context, o.causal)
        self.memory = llama.llama_get_memory(self.context)
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def rewind(self, position):
        """Forgets what is cached from a position on, where there is a cache."""
        if self.memory:
            self.llama.llama_memory_seq_rm(self.memory, 0, position, -1)

    def decode(self, ids, position, all_logits=True):
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or i == len(ids) - 1
        code = self.llama.llama_decode(self.context, batch)
        self.llama.llama_synchronize(self.context)
        self.llama.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode of {len(ids)} rows at {position}: code {code}")

    def logits(self, rows):
        """Of the last forward, (rows, V) f32; numpy is needed for this alone."""
        import numpy as np

        flat = ctypes.cast(self.llama.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(flat, (rows, self.vocab_size)).copy()


def shapes(text):
    return [tuple(int(n) for n in shape.split("@")) for shape in text.split(",")]


def some_ids(count, vocab_size):
    """Ids over the whole vocabulary, the same at every call."""
    return [(7919 + i * 104729) % vocab_size for i in range(count)]


def time_forwards(decoder, wanted, runs):
    found = {}
    for rows, position in wanted:
        ids = some_ids(position + rows, decoder.vocab_size)
        decoder.rewind(0)
        if position:
            decoder.decode(ids[:position], 0, all_logits=False)
        times = []
        for _ in range(runs + 1):
            decoder.rewind(position)
            start = time.perf_counter()
            decoder.decode(ids[position:], position)
            times.append((time.perf_counter() - start) * 1e3)
        found[f"{rows}@{position}"] = {"median": statistics.median(times[1:]), "best": min(times[1:])}
    return found


def greedy(decoder, first, count):
    """Most probable tokens after the ids `first`, one forward each, ties to the lower id."""
    tokens, ids, position = [], first, 0
    for _ in range(count):
        decoder.decode(ids, position, all_logits=False)
        position += len(ids)
        ids = [int(decoder.logits(1)[0].argmax())]
        tokens += ids
    return tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--forward", type=shapes, default=[], help="forwards to time")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--logits", type=shapes, help="one ROWS@POSITION whose logits are written")
    parser.add_argument("--ids", type=pathlib.Path, help="JSON array of the ids, POSITION + ROWS of them")
    parser.add_argument("--greedy", type=int, help="how many greedy tokens to print after --ids")
    parser.add_argument("--out", type=pathlib.Path, help="where logits go, as .npy")
    o = parser.parse_args()
    ids = json.loads(o.ids.read_text()) if o.ids else []
    wanted = o.forward + (o.logits or [])
    positions = max([rows + position for rows, position in wanted] + [len(ids) + (o.greedy or 0)])
    decoder = Decoder(bindings(), o, positions, max([max(shape) for shape in wanted] + [len(ids)]))
    answer = {"vocab_size": decoder.vocab_size, "forwards": time_forwards(decoder, o.forward, o.runs)}
    if o.logits:
        import numpy as np

        ((rows, position),) = o.logits
        if position:
            decoder.decode(ids[:position], 0, all_logits=False)
        decoder.decode(ids[position:], position)
        np.save(o.out, decoder.logits(rows))
    if o.greedy:
        answer["tokens"] = greedy(decoder, ids, o.greedy)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
