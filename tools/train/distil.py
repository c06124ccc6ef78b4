#!/usr/bin/env python3
"""Train a small model on texts that a larger one writes, in one run of minutes on one GPU.

    python3 distil.py prepare CORPUS TEACHER WORK/data --tokenizer MODEL/tokenizer.json
    python3 distil.py run TEACHER WORK/data WORK/tmp OUT --device cuda --stop-after 545 -- --dim 256 ...

`prepare` needs the corpus; `run` needs its folder alone, and a teacher: a directory in the Llama
layout. `run` starts the trainer (train.py), which compiles meanwhile, and the teacher (teacher.py),
which is fine-tuned on the corpus and writes; texts are filtered and tokenised as they come. Then
the trainer learns them, mixed with the corpus. What stands behind `--` goes to train.py.

Parts of the corpus as train.py knows them: `simple`, the texts in the plainer of two registers,
`other`, the rest, and `written`, what the teacher wrote. Only `simple` teaches.

Every phase ends at its time in seconds since the start. A teacher that fails is tried once more,
with less; what it had written stays. If that is nothing, the corpus alone is learnt. A trainer that fails
starts again from its last report, with half the batch and later without compilation.
"""
import time

STARTED = time.time()

import argparse
import collections
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
from tokenizers import Tokenizer

from prepare import given_tokenizer, read_documents, write_arrays

HERE = os.path.dirname(os.path.abspath(__file__))


def elapsed():
    return time.time() - STARTED


def say(text):
    print(f"distil, {elapsed():.0f} s: {text}", flush=True)


# ---- prepare ---------------------------------------------------------------------------------------

def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def plain_register(documents, margin=0.25, rounds=12):
    """Boolean per document: written in the plainer one of two registers.

    First guess: short, and nearly all words common ones. Then naive Bayes learns the words of both
    groups and sorts again, until nothing changes. `margin`: how far a document lies on the plain
    side, in nats a word, at least.
    """
    words = [words_of(d) for d in documents]
    seen = collections.Counter(w for ws in words for w in set(ws))
    common = {w for w, _ in seen.most_common(1500)}
    plain = [len(ws) < 260 and sum(w in common for w in ws) > 0.93 * len(ws) for ws in words]
    known = {w for w, count in seen.items() if count >= 5}
    counts = [collections.Counter(w for w in ws if w in known) for ws in words]
    for _ in range(rounds):
        groups = collections.Counter(), collections.Counter()
        for is_plain, count in zip(plain, counts):
            groups[is_plain].update(count)
        sums = [sum(g.values()) + len(known) for g in groups]
        ratio = {w: math.log((groups[1][w] + 1) / sums[1] * sums[0] / (groups[0][w] + 1)) for w in known}
        score = [sum(ratio[w] * n for w, n in c.items()) / max(1, sum(c.values())) for c in counts]
        again = [s > 0 for s in score]
        if again == plain:
            break
        plain = again
    return np.array([s > margin for s in score])


def whole_texts(text):
    """Texts that were joined by mistake, apart: a paragraph that begins as a story does begins one."""
    parts, lines = [], text.split("\n")
    for line in lines:
        if not parts or (line.startswith("Once upon a time") and len(parts[-1]) > 150):
            parts.append(line)
        else:
            parts[-1] += "\n" + line
    return [p.strip() for p in parts]


def ends(text):
    return text.rstrip()[-1:] in tuple('.!?"\'')


def array_of(documents, encode, first=()):
    """Token ids of all documents one behind the other, and where each begins, and the end."""
    pieces = [np.array([*first, *e.ids]) for e in encode(documents)]
    return np.concatenate(pieces), np.cumsum([0] + [len(p) for p in pieces])


def prepare(args):
    os.makedirs(args.out, exist_ok=True)
    tok = given_tokenizer(args.tokenizer)
    documents = read_documents(args.corpus, args.part)
    heldout = np.random.default_rng(args.seed).random(len(documents)) < args.heldout  # as prepare.py draws
    plain = plain_register(documents)
    tokens, start = array_of(documents, tok.encode_batch_fast, first=(0,))
    write_arrays(os.path.join(args.out, "data.npz"), {
        "tokens": tokens.astype(np.uint16), "doc_start": start, "doc_part": (~plain).astype(np.int8),
        "doc_heldout": heldout, "parts": np.array(["simple", "other"]),
    }, compress=True)
    shutil.copyfile(args.tokenizer, os.path.join(args.out, "tokenizer.json"))
    with open(os.path.join(args.out, "prepare.json"), "w") as f:
        json.dump({"vocab_size": tok.get_vocab_size(), "tokens": len(tokens)}, f)
    for name, group in (("simple", plain), ("other", ~plain)):
        size = int(np.diff(start)[group].sum())
        print(f"{name}: {group.sum()} documents ({(group & heldout).sum()} held out), {size} tokens")

    texts, held = [], []
    for document, is_held in ((d, h) for d, p, h in zip(documents, plain, heldout) if p):
        for text in whole_texts(document):
            if is_held or (len(text) > 150 and ends(text)):
                texts.append(text)
                held.append(is_held)
    teacher = Tokenizer.from_file(os.path.join(args.teacher, "tokenizer.json"))
    tokens, start = array_of(texts, teacher.encode_batch_fast)
    # Every byte stays, so that each text can still be written.
    end = teacher.token_to_id("<|endoftext|>")
    if end is None:
        raise SystemExit(f"{args.teacher}: no token <|endoftext|>")
    kept = np.concatenate(([end], np.setdiff1d(np.unique(tokens), [end])))
    place = np.full(teacher.get_vocab_size(), -1)
    place[kept] = np.arange(len(kept))
    pieces = [b"" if i == end else bytes_of(teacher.id_to_token(int(i))) for i in kept]
    write_arrays(os.path.join(args.out, "teacher.npz"), {
        "tokens": place[tokens].astype(np.uint16), "doc_start": start, "doc_heldout": np.array(held),
        "kept": kept.astype(np.int32), "pieces": np.frombuffer(b"".join(pieces), np.uint8),
        "piece_start": np.cumsum([0] + [len(p) for p in pieces]),
    }, compress=True)
    cut = b"".join(pieces[i] for i in place[tokens[:start[1]]]).decode()
    assert cut == texts[0], "the first text does not come back from the teacher's tokens"
    print(f"teacher: {len(texts)} texts ({sum(held)} held out), {len(tokens)} tokens, {len(kept)} different ones")
    for name in sorted(os.listdir(args.out)):
        print(f"{name}: {os.path.getsize(os.path.join(args.out, name)) / 1e6:.2f} MB")


def byte_letters():
    """The letter that byte-level BPE writes for each byte, as letter -> byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in shown}
    hidden = (b for b in range(256) if b not in shown)
    return letters | {chr(256 + i): b for i, b in enumerate(hidden)}


LETTERS = byte_letters()


def bytes_of(token):
    return bytes(LETTERS[c] for c in token)


# ---- texts of the teacher ----------------------------------------------------------------------------

def fault(text):
    """Why a text is no good story, or None."""
    if not ends(text):
        return "does not end"
    words = words_of(text)
    if len(words) < 40:
        return "short"
    for n in (1, 2, 3, 4, 5, 6):  # the same n words three times in a row
        if any(words[i:i + n] == words[i + n:i + 2 * n] == words[i + 2 * n:i + 3 * n] for i in range(len(words) - 3 * n)):
            return "loops"
    triples = collections.Counter(zip(words, words[1:], words[2:]))
    if max(triples.values()) > max(5, len(words) // 20):
        return "loops"
    sentences = collections.Counter(s.strip() for s in re.split(r"[.!?\n]", text) if len(s) > 20)
    if sentences and max(sentences.values()) > 2:
        return "loops"
    if text.count('"') % 2:
        return "quotes"
    return None


WORKER = {}


def start_worker(data, limit):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    archive = np.load(os.path.join(data, "teacher.npz"))
    raw, start = archive["pieces"].tobytes(), archive["piece_start"]
    WORKER.update(pieces=[raw[a:b] for a, b in zip(start, start[1:])], limit=limit,
                  tok=Tokenizer.from_file(os.path.join(data, "tokenizer.json")))


def read_written(path, first_texts):
    """One file of the teacher -> (token ids, starts, hashes of the texts, faults counted, some texts)."""
    pieces = WORKER["pieces"]
    with np.load(path) as archive:
        tokens, start = archive["tokens"].tolist(), archive["start"].tolist()
    good, faults = [], collections.Counter()
    for a, b in zip(start, start[1:]):
        try:
            text = b"".join([pieces[t] for t in tokens[a:b]]).decode().strip()
        except UnicodeDecodeError:
            faults["bytes"] += 1
            continue
        why = fault(text)
        if why:
            faults[why] += 1
        else:
            good.append(text)
    kept, texts = [], []
    for text, e in zip(good, WORKER["tok"].encode_batch_fast(good)):
        if len(e.ids) > WORKER["limit"]:
            faults["long"] += 1
        else:
            kept.append(np.array([0, *e.ids], np.uint16))
            texts.append(text)
    ids = np.concatenate(kept) if kept else np.zeros(0, np.uint16)
    lengths = np.array([len(k) for k in kept], np.int64)
    return ids, lengths, [hash_of(t) for t in texts], faults, texts[:first_texts]


def hash_of(text):
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class Gathering:
    """The teacher's files, read by other processes while it writes the next ones."""

    def __init__(self, args):
        self.folder, self.given = os.path.join(args.tmp, "written"), 0
        os.makedirs(self.folder, exist_ok=True)
        # `spawn`: nothing of this process has to be safe to copy.
        self.pool = multiprocessing.get_context("spawn").Pool(args.readers, start_worker, (args.data, args.length - 2))
        self.waiting, self.results = [], []
        self.each = args.sample_texts

    def look(self):
        while os.path.exists(path := os.path.join(self.folder, f"written-{self.given}.npz")):
            self.waiting.append(self.pool.apply_async(read_written, (path, self.each)))
            self.given += 1

    def wait(self, until):
        """All results that are there in time; a file that cannot be read is left out."""
        for result in self.waiting:
            try:
                self.results.append(result.get(max(0.1, until - elapsed())))
            except Exception as error:
                say(f"a file of texts is left out: {type(error).__name__}: {error}")
        self.pool.terminate()
        ids, lengths, seen, texts = [], [], set(), []
        faults, twice = collections.Counter(), 0
        for tokens, sizes, hashes, bad, some in self.results:
            faults += bad
            new = np.zeros(len(hashes), bool)
            for i, h in enumerate(hashes):
                new[i] = h not in seen
                seen.add(h)
            twice += int((~new).sum())
            ids.append(tokens[np.repeat(new, sizes)])
            lengths.append(sizes[new])
            texts += [t for t, n in zip(some, new) if n]
        faults["twice"] = twice
        ids = np.concatenate(ids) if ids else np.zeros(0, np.uint16)
        lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        say(f"{len(lengths)} texts kept, {len(ids)} tokens; left out: {dict(faults)}")
        return ids, lengths, texts


def write_data(args, ids, lengths):
    """The folder of train.py: the corpus, with the teacher's texts behind it as the part `written`."""
    folder = os.path.join(args.tmp, "data")
    os.makedirs(folder, exist_ok=True)
    with np.load(os.path.join(args.data, "data.npz")) as archive:
        data = {name: archive[name] for name in archive.files}
    with open(os.path.join(args.data, "prepare.json")) as f:
        description = json.load(f)
    with open(os.path.join(folder, "prepare.json"), "w") as f:
        json.dump(description, f)
    end, count = data["doc_start"][-1], len(lengths)
    write_arrays(os.path.join(folder, "data.npz"), {
        "tokens": np.concatenate((data["tokens"], ids)),
        "doc_start": np.concatenate((data["doc_start"], end + np.cumsum(lengths))),
        "doc_part": np.concatenate((data["doc_part"], np.full(count, len(data["parts"]), np.int8))),
        "doc_heldout": np.concatenate((data["doc_heldout"], np.zeros(count, bool))),
        "parts": np.array([*data["parts"], "written"]),
    }, compress=False)


# ---- the trainer -------------------------------------------------------------------------------------

class Student:
    """train.py as a process of its own, started again where it fails."""

    def __init__(self, args):
        self.args, self.tries, self.process, self.done = args, 0, None, False
        self.plain = False  # compilation hung
        self.then = os.path.join(args.tmp, "data")
        self.log = os.path.join(args.out, "run", "log.jsonl")
        self.start()

    def start(self):
        args, left = self.args, self.args.stop_after - elapsed()
        self.tries += 1
        command = [
            sys.executable, os.path.join(HERE, "train.py"), "--data", args.data, "--out", os.path.dirname(self.log),
            "--export", os.path.join(args.out, "model"), "--device", args.device, "--workers", "1",
            "--checkpoint", os.path.join(args.tmp, "checkpoint.pt"), "--no-plot", "--max-shard-mib", "15",
            "--then", self.then, "--then-within", str(max(1, args.data_by + 15 - elapsed())),
            "--main-parts", "written", "--other-parts", "simple", "--main-share", str(args.written_share),
            "--heldout-parts", "simple", "--doc-start-share", "0.85", "--length", str(args.length),
            "--batch-tokens", str(args.batch_tokens >> self.tries - 1), "--stop-after", str(left), *args.train,
        ]
        if self.plain or self.tries > 2:
            command.append("--no-compile")
        self.began = time.time()
        self.process = subprocess.Popen(command)

    def stuck(self):
        """Whether it says nothing for too long: before its first line, or since that line and its data."""
        spoke = os.path.getmtime(self.log) if os.path.exists(self.log) else 0
        if spoke < self.began:
            return time.time() - self.began > self.args.slowest_start
        data = os.path.join(self.then, "data.npz")
        if not os.path.exists(data):
            return False
        return time.time() - max(spoke, os.path.getmtime(data)) > self.args.patience

    def look(self):
        """About twice a second: see that it lives."""
        if self.done:
            return
        ended = self.process.poll()
        if ended == 0:
            self.done = True
            return
        if ended is None and not self.stuck():
            return
        if ended is None:
            say("the trainer is stuck")
            self.process.kill()
            self.process.wait()
            self.plain = True
        else:
            say(f"the trainer ended with status {ended}")
        if self.args.stop_after - elapsed() < 25 or self.tries >= 5:
            self.done = True
        else:
            self.start()


def start_teacher(args, folder, tries):
    """teacher.py as a process of its own; the second try asks for less of everything."""
    teach_until = max(args.teach_until - elapsed(), 35 if tries > 1 else 1)
    command = [sys.executable, os.path.join(HERE, "teacher.py"), args.teacher, args.data, folder,
               "--device", args.device, "--teach-until", str(teach_until),
               "--write-until", str(args.write_until - elapsed()), *args.teacher_options.split()]
    if tries > 1:
        command += ["--batch-tokens", "8192", "--slots", "1024", "--no-graph"]
    return subprocess.Popen(command)


def run(args):
    for folder in (args.tmp, os.path.join(args.out, "run")):
        os.makedirs(folder, exist_ok=True)
    student = Student(args)
    gathering = Gathering(args)
    teacher, tries = start_teacher(args, gathering.folder, 1), 1
    while elapsed() < args.write_until + 8:
        if teacher.poll() is not None:
            say(f"the teacher ended with status {teacher.returncode}")
            if teacher.returncode == 0 or tries == 2 or elapsed() > args.write_until - 50:
                break
            tries = 2
            teacher = start_teacher(args, gathering.folder, tries)
        gathering.look()
        student.look()
        time.sleep(0.5)
    if teacher.poll() is None:
        say("the teacher is late and is ended")
        teacher.kill()
        teacher.wait()
    gathering.look()
    ids, lengths, texts = gathering.wait(args.data_by)
    write_data(args, ids, lengths)
    if texts:
        with lzma.open(os.path.join(args.out, "texts.txt.xz"), "wt") as f:
            f.write("\n<|endoftext|>\n".join(texts) + "\n")
        say(f"{len(texts)} texts in texts.txt.xz")
    while not student.done:
        student.look()
        if elapsed() > args.stop_after + 12:
            say("the trainer is late and is ended; the last report's model stays")
            student.process.kill()
            break
        time.sleep(0.5)
    say("finished")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="tokens of both models from the corpus")
    p.add_argument("corpus")
    p.add_argument("teacher", help="directory with the teacher's tokenizer.json")
    p.add_argument("out")
    p.add_argument("--tokenizer", required=True, help="tokenizer.json of the model to be trained")
    p.add_argument("--part", default="stories")
    p.add_argument("--heldout", type=float, default=0.02)
    p.add_argument("--seed", type=int, default=1)
    p = commands.add_parser("run", help="teach, write, train")
    p.add_argument("teacher", help="directory in the Llama layout, or `trial`: random weights, for a trial")
    p.add_argument("data", help="folder of `prepare`")
    p.add_argument("tmp", help="folder for what is not kept; must be empty at first")
    p.add_argument("out", help="folder for model, log and texts")
    p.add_argument("--device", default="cpu")
    p.add_argument("--teach-until", type=float, default=55, metavar="SECONDS")
    p.add_argument("--write-until", type=float, default=200, metavar="SECONDS")
    p.add_argument("--data-by", type=float, default=212, metavar="SECONDS", help="training begins then at the latest")
    p.add_argument("--stop-after", type=float, default=545, metavar="SECONDS")
    p.add_argument("--written-share", type=float, default=0.85, help="share of the teacher's texts in training")
    p.add_argument("--length", type=int, default=256, help="of a training sequence; longer texts are left out")
    p.add_argument("--batch-tokens", type=int, default=65536)
    p.add_argument("--teacher-options", default="", help="more options of teacher.py, in one string")
    p.add_argument("--readers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 4)),
                   help="processes that read what the teacher wrote")
    p.add_argument("--sample-texts", type=int, default=600, help="texts of each of its files to keep as text")
    p.add_argument("--patience", type=float, default=60, metavar="SECONDS",
                   help="silence after which the trainer is taken for stuck")
    p.add_argument("--slowest-start", type=float, default=150, metavar="SECONDS",
                   help="until its first line: start, compilation and the first table")
    own, train = sys.argv[1:], []
    if "--" in own:
        own, train = own[:own.index("--")], own[own.index("--") + 1:]
    args = ap.parse_args(own)
    args.train = train
    {"prepare": prepare, "run": run}[args.command](args)


if __name__ == "__main__":
    main()
