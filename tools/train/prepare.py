#!/usr/bin/env python3
"""Train the tokenizer, or take a given one, and turn a folder of text into one token array.

    python3 prepare.py CORPUS WORK/data
    python3 prepare.py CORPUS WORK/data --tokenizer NAME/tokenizer.json --parts stories,tales --compress

Input: a folder with `stories.txt.xz`, `tales.txt.xz`, `children.txt.xz` (or any other `NAME.txt[.xz]`):
plain text, documents separated by a line `<|endoftext|>`.

Output folder:
  tokenizer.json   byte-level BPE; id 0 `<|endoftext|>`, 1 `<|pad|>`, last id `<|mask|>`
  data.npz         tokens (uint16, `<|endoftext|>` in front of each document), doc_start, doc_part,
                   doc_heldout, parts (names); `--compress` makes a file that travels well
"""
import argparse
import json
import lzma
import os
import shutil
import time
import zipfile

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

EOT, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"


def read_documents(folder, part):
    """The documents of one part, in file order, without their separators."""
    plain = os.path.join(folder, part + ".txt")
    opener = (lambda: open(plain, "rt")) if os.path.exists(plain) else (lambda: lzma.open(plain + ".xz", "rt"))
    with opener() as f:
        documents = (d.strip() for d in f.read().split(EOT))
        return [d for d in documents if d]


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE with exactly `vocab_size` ids, MASK being the last one (the BD3-LM convention)."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one id is kept for MASK
        special_tokens=[AddedToken(EOT, special=True), AddedToken(PAD, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(MASK, special=True)])
    assert tok.get_vocab_size() == vocab_size, tok.get_vocab_size()
    assert sorted(tok.get_vocab().values()) == list(range(vocab_size))
    assert [tok.token_to_id(t) for t in (EOT, PAD, MASK)] == [0, 1, vocab_size - 1]
    return tok


def given_tokenizer(path):
    """A tokenizer of an earlier model, with the ids that training relies on."""
    try:
        tok = Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise SystemExit(f"{path}: no tokenizer.json: {error}")
    vocab = tok.get_vocab_size()
    if not 3 < vocab <= 65536:
        raise SystemExit(f"{path}: {vocab} ids; tokens are stored as uint16, expected at most 65536")
    if sorted(tok.get_vocab().values()) != list(range(vocab)):
        raise SystemExit(f"{path}: expected the ids 0 to {vocab - 1}, each once")
    for name, expected in ((EOT, 0), (PAD, 1), (MASK, vocab - 1)):
        if tok.token_to_id(name) != expected:
            raise SystemExit(f"{path}: {name}: expected id {expected}, found {tok.token_to_id(name)}")
    return tok


def write_arrays(path, arrays, compress):
    """What np.load reads, as it is or by LZMA: 0.82 bytes a token, where zlib needs 1.15."""
    with zipfile.ZipFile(path + ".tmp", "w", zipfile.ZIP_LZMA if compress else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(name + ".npy", "w", force_zip64=True) as f:
                np.lib.format.write_array(f, np.asarray(array), allow_pickle=False)
    os.replace(path + ".tmp", path)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("corpus", help="folder with the text files")
    ap.add_argument("out", help="folder to write tokenizer.json and data.npz to")
    ap.add_argument("--parts", default="stories,tales,children", help="parts to tokenise")
    ap.add_argument("--tokenizer", help="take this tokenizer.json instead of training one")
    ap.add_argument("--tokenizer-parts", default="stories,tales", help="parts the tokenizer is trained on")
    ap.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained")
    ap.add_argument("--compress", action="store_true",
                    help="write data.npz by LZMA: 0.4 of the size, some 4 s a million tokens")
    ap.add_argument("--heldout", type=float, default=0.02, help="share of documents kept back for the loss table")
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    os.makedirs(args.out, exist_ok=True)
    assert args.vocab_size <= 65536, "tokens are stored as uint16"

    parts = args.parts.split(",")
    documents = {p: read_documents(args.corpus, p) for p in parts}
    # Which documents are held out is drawn before the tokenizer sees any text.
    rng = np.random.default_rng(args.seed)
    heldout = {p: rng.random(len(documents[p])) < args.heldout for p in parts}

    t0, target = time.time(), os.path.join(args.out, "tokenizer.json")
    if args.tokenizer:
        tok = given_tokenizer(args.tokenizer)
        args.vocab_size = tok.get_vocab_size()
        if not os.path.exists(target) or not os.path.samefile(args.tokenizer, target):
            shutil.copyfile(args.tokenizer, target)
        print(f"tokenizer: {args.vocab_size} ids, given")
    else:
        texts = [d for p in args.tokenizer_parts.split(",") for d, h in zip(documents[p], heldout[p]) if not h]
        tok = train_tokenizer(texts, args.vocab_size)
        tok.save(target)
        print(f"tokenizer: {args.vocab_size} ids in {time.time() - t0:.1f} s")

    chunks, starts, doc_part, doc_heldout, position = [], [], [], [], 0
    for index, part in enumerate(parts):
        encoded = tok.encode_batch_fast(documents[part])
        count = 0
        for doc, enc, held in zip(documents[part], encoded, heldout[part]):
            ids = np.array([0] + enc.ids, dtype=np.uint16)
            chunks.append(ids)
            starts.append(position)
            doc_part.append(index)
            doc_heldout.append(held)
            position += len(ids)
            count += len(ids)
        if tok.decode(encoded[0].ids, skip_special_tokens=False) != documents[part][0]:
            raise SystemExit(f"{part}: the first document does not come back from its tokens; expected a tokenizer "
                             "that keeps every byte")
        print(f"{part}: {len(documents[part])} documents ({int(heldout[part].sum())} held out), {count} tokens")
    path = os.path.join(args.out, "data.npz")
    arrays = {
        "tokens": np.concatenate(chunks),
        "doc_start": np.array(starts + [position], dtype=np.int64),  # one more entry than documents: the end
        "doc_part": np.array(doc_part, dtype=np.int8),
        "doc_heldout": np.array(doc_heldout, dtype=bool),
        "parts": np.array(parts),
    }
    write_arrays(path, arrays, args.compress)
    print(f"data.npz: {position} tokens, {os.path.getsize(path) / 1e6:.1f} MB, {time.time() - t0:.0f} s")
    with open(os.path.join(args.out, "prepare.json"), "w") as f:
        json.dump(vars(args) | {"tokens": position}, f)


if __name__ == "__main__":
    main()
