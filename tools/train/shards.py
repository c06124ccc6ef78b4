"""Weights of a model directory: one `model.safetensors`, or shards with an index, as Hugging Face
publishes them."""
import json
import os
import re
import sys

from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MIB = 1 << 20


def replace_json(path, value):
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
    os.replace(path + ".tmp", path)


def stored_bytes(name, tensor):
    """Bytes that a tensor takes in a file, at most: its data and its line of the header."""
    return tensor.numel() * tensor.element_size() + len(name) + 160


def pack(tensors, limit):
    """Names in shards of at most `limit` bytes each, few of them: the largest tensors first, each
    into the first shard with room.

    A tensor larger than a shard gets one of its own, with a warning.
    """
    shards, room = [], []
    for name in sorted(tensors, key=lambda n: (-stored_bytes(n, tensors[n]), n)):
        need = stored_bytes(name, tensors[name])
        if need > limit:
            print(f"tensor {name}: {need / MIB:.1f} MiB, more than a shard of {limit / MIB:.1f} MiB takes; "
                  "its shard is larger", file=sys.stderr)
        at = next((i for i, free in enumerate(room) if need <= free), len(room))
        if at == len(room):
            shards.append([])
            room.append(limit)
        shards[at].append(name)
        room[at] -= need
    return [sorted(names) for names in shards]


def write_weights(tensors, folder, max_shard_mib):
    """Write `tensors` (name -> tensor on the CPU) into one file, or into shards of at most
    `max_shard_mib` MiB where one does not do.

    Each file gets a temporary name first and is renamed; files of an earlier export that are no
    part of this one are removed last. A reader in between can meet shards of both, never half a
    file. Returns the names of the files.
    """
    shards = pack(tensors, int(max_shard_mib * MIB) - 1024)  # 1 KiB: length and metadata of a header
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, chosen in zip(names, shards):
        path = os.path.join(folder, name)
        save_file({n: tensors[n] for n in chosen}, path + ".tmp", metadata={"format": "pt"})
        os.chmod(path + ".tmp", 0o644)
    for name in names:
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))
    if len(names) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        shard_of = {n: name for name, chosen in zip(names, shards) for n in chosen}
        replace_json(os.path.join(folder, INDEX),
                     {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))})
    kept = {*names, INDEX} if len(names) > 1 else {SINGLE}
    for name in os.listdir(folder):
        if (name in (SINGLE, INDEX) or SHARD.fullmatch(name)) and name not in kept:
            os.remove(os.path.join(folder, name))
    return names


def weight_files(folder):
    """Paths of the files that hold the weights of a directory."""
    single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
    if os.path.exists(single):
        return [single]
    if not os.path.exists(index):
        raise SystemExit(f"{folder}: no weights; expected {SINGLE}, or {INDEX} with its shards")
    with open(index) as f:
        return [os.path.join(folder, name) for name in sorted(set(json.load(f)["weight_map"].values()))]


def read_weights(folder):
    """All tensors of a directory by name."""
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
