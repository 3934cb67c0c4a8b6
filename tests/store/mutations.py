"""Damages modules' files at random, and loads each: ``python tests/store/mutations.py COUNT``.

Each must load to the tensors that are in the file, or raise the project's own error and leave the
host as it was, within two seconds of the processor, in a process that may allocate a gigabyte.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import modgraft as mg
from modgraft.store.card import card_digest
from modgraft.store.file import digest_of
from modgraft.store.fingerprint import _sample, fingerprint

SECONDS, ROOM = 2.0, 2**30
FILE = "module.safetensors"
Damage = Callable[[random.Random, Path], None]


class TooLongError(BaseException):
    """No error that a library would catch."""


def fresh() -> mg.Host:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**size, intermediate_size=24, max_position_embeddings=32, num_labels=4)
    return mg.Host(BertForSequenceClassification(config)).eval()


def folders(root: Path) -> list[Path]:
    """Save modules of several kinds, one in the first format, and return their folders."""
    host = fresh()
    host.implant("a", mg.LoRA(rank=2), at=["query", "value"])
    host.implant("b", mg.SparseDelta(density=0.5), at=["query", "value"])
    host.implant("c", mg.Adapter(reduction=4), at="block")
    host.implant("d", mg.SoftPrompt(length=3))
    host.implant("e", mg.LoRA(rank=2), at=["query", "value"])
    host.implant("f", mg.Mixture(["a", "e"], router=mg.TopK(1)), active=False)
    host.implant("g", mg.Prefix(length=3))
    with torch.no_grad():
        for parameter in host.implants.parameters():
            if parameter.is_floating_point():
                parameter.normal_()
    made = [host.save(name, root / name) for name in "abcdg"] + [host.save("f", root / "f")]
    made.append(host.save(["a", "b"], root / "bundle", metrics={"f1": 0.5}, data="made up"))
    host.model.classifier.requires_grad_(True)
    made.append(host.save("a", root / "beside"))
    return [*made, former(root / "a", root / "former", host)]


def former(folder: Path, to: Path, host: mg.Host) -> Path:
    """Write a module in the first format."""
    tensors, metadata = read(folder / FILE)
    said = json.loads(metadata["modgraft"])["modules"][0]
    here = fingerprint(mg.Host(host.model).model)
    named = sorted(host.model.named_parameters(), key=lambda item: item[0])
    shapes = "".join(f"{name}{list(p.shape)};" for name, p in named)
    about = {
        "architecture": here["architecture"],
        "shape": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "weights": _sample(host.model, (), torch.float32),
    }
    to.mkdir()
    card = {"format": 1, **said, "host": about}
    (to / "module.json").write_text(json.dumps(card))
    own = {name.removeprefix("a:"): tensor for name, tensor in tensors.items()}
    (to / FILE).write_bytes(save(own))
    return to


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = path.read_bytes()
    header, _ = split(content)
    return load(content), header.get("__metadata__", {})


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


# -- what is done to a folder ---------------------------------------------------------------------


def bits(draw: random.Random, folder: Path) -> None:
    """Flip bits anywhere, most often in the header."""
    path = folder / FILE
    if not has_hash(folder):  # of the first format, which cannot know
        path = folder / "module.json"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") if path.name == FILE else len(content)
    end = draw.choice([start, len(content)])
    for _ in range(draw.choice([1, 1, 2, 8])):
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def sizes(draw: random.Random, folder: Path) -> None:
    """Cut the file, make it longer, or change its middle."""
    content = (folder / FILE).read_bytes()
    at = draw.randrange(len(content))
    new = draw.choice(
        [
            content[:at],
            content[at:],
            content + bytes(at),
            content[:at] + b"\0" + content[at:],
            content[:8] + content[8 + at % 64 :],
            b"",
            content * 2,
            os.urandom(at),
        ]
    )
    (folder / FILE).write_bytes(new)


HUGE = [0, 1, -1, 2, 2**31, 2**48, 2**62, 2**63, 2**64, 10**30, 1.5, 1e300, True, None, "1", [], {}]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "F8_E4M3",
    "U64",
    "f32",
    "",
    3,
    None,
]


def header(draw: random.Random, folder: Path) -> None:
    """Lie in the header about one tensor or several."""
    said, data = split((folder / FILE).read_bytes())
    names = [k for k in said if k != "__metadata__"]
    for name in draw.sample(names, min(len(names), draw.choice([1, 1, 3]))):
        entry = said[name]
        what = draw.randrange(9)
        if what == 0:
            entry["dtype"] = draw.choice(DTYPES)
        elif what == 1:
            entry["shape"] = [draw.choice(HUGE) for _ in range(draw.randrange(5))]
        elif what == 2:
            entry["data_offsets"] = [draw.choice(HUGE), draw.choice(HUGE)]
        elif what == 3:
            entry["shape"] = [2] * 10 ** draw.randrange(5)
        elif what == 4:  # overlapping, or a hole
            entry["data_offsets"] = [
                max(0, n + draw.choice([-8, -4, 4])) for n in entry["data_offsets"]
            ]
        elif what == 5:
            said[draw.choice(NAMES)] = said.pop(name)
        elif what == 6:
            said[name] = draw.choice([None, [], "x", {}, entry | {"more": 1}])
        elif what == 7:
            said["__metadata__"] = draw.choice([{}, None, [], {"modgraft": 3}, {"modgraft": "{}"}])
        elif what == 8:
            del said[name]
    (folder / FILE).write_bytes(joined(said, data))


NAMES = [
    "../../x",
    "/etc/passwd",
    "",
    ":",
    "::",
    "a:..:A",
    "a:bert:A",
    "a\0b",
    "x" * 10**5,
    "é\ud800",
]


def length(draw: random.Random, folder: Path) -> None:
    """Lie about the header's length."""
    said, data = split((folder / FILE).read_bytes())
    long = draw.choice([0, 1, 2, 7, 100, 2**16, 2**25, 2**25 + 1, 2**31, 2**63, 2**64 - 1])
    (folder / FILE).write_bytes(joined(said, data, long))


def bomb(draw: random.Random, folder: Path) -> None:
    """Put JSON that is deep, wide, or no JSON where the header or the card is."""
    many = 10 ** draw.randrange(3, 6)
    text = draw.choice(
        [
            b"[" * many,
            b'{"a":' * many,
            b"[" * many + b"]" * many,
            b'{"a":1,"a":2}',
            b'{"a":NaN}',
            b'{"a":1e999}',
            b'{"a":' + b"9" * many + b"}",
            b'"\\ud800"',
            b"null",
            b"3",
            b"{" + b",".join(b'"%d":{}' % i for i in range(many)) + b"}",
            b" " * many,
            b"\xff\xfe{}",
        ]
    )
    if not has_hash(folder):
        (folder / "module.json").write_bytes(text)
    elif draw.random() < 0.5:
        (folder / FILE).write_bytes(joined(text, b""))
    else:
        said, data = split((folder / FILE).read_bytes())
        said["__metadata__"]["modgraft"] = text.decode("utf-8", "replace")
        (folder / FILE).write_bytes(joined(said, data))


def no_file(draw: random.Random, folder: Path) -> None:
    """Put something else where the file was."""
    path = folder / draw.choice([FILE, FILE, "module.json"])
    (folder / "own").write_bytes(path.read_bytes())
    path.unlink()
    what = draw.randrange(9)
    if what == 0:
        path.symlink_to(folder / "own")
    elif what == 1:
        path.symlink_to(path)
    elif what == 2:
        os.mkfifo(path)
    elif what == 3:
        path.mkdir()
    elif what == 4:
        path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/dev/random", "/dev/full"]))
    elif what == 5:
        path.symlink_to(folder / "nowhere")
    elif what == 6:
        here = Path.cwd()
        os.chdir(folder)  # a socket's name is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif what == 7:
        with path.open("wb") as file:
            file.write(draw.choice([2, 2**25, 2**32, 2**33]).to_bytes(8, "little") + b"{}")
            file.truncate(2**33)  # sparse
    else:
        path.symlink_to("/proc/self/mem")


VALUES: list[Any] = [
    *HUGE,
    float("inf"),
    float("nan"),
    "*",
    "**",
    "query",
    "bert",
    "",
    "..",
    "{a,b}" * 9,
    "[residual]",
    "bert.encoder.layer.*.attention.self.query",
    "(" * 500,
    "x" * 10**5,
    [[]] * 50,
    ["x"] * 10**4,
    "LoRA",
    "GatedFusion",
    "Mixture",
    "Host",
    "object",
    {"type": "LoRA", "config": {}},
    10**9,
    3 * 10**7,
]


def forged_card(draw: random.Random, folder: Path) -> None:
    """Change something in the card, with a hash that agrees."""
    said = card_of(folder)
    for _ in range(draw.choice([1, 1, 2])):
        inside, key = place(draw, said)
        if draw.random() < 0.15:
            del inside[key]
        elif draw.random() < 0.1 and isinstance(inside, dict):
            key = draw.choice(["rank", "dim", "extra", "type", "config"])
            inside[key] = copy.deepcopy(draw.choice(VALUES))
        else:
            inside[key] = copy.deepcopy(draw.choice(VALUES))
    put_card(folder, said)


def place(draw: random.Random, said: Any) -> tuple[Any, Any]:
    """Choose a place in JSON, those deep inside as often as those above."""
    found: list[tuple[Any, Any]] = []

    def walk(inside: Any, depth: int) -> None:
        keys = inside if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            found.append((inside, key))
            if isinstance(inside[key], dict | list) and key != "host" and depth < 20:
                walk(inside[key], depth + 1)

    walk(said, 0)
    return draw.choice(found)


def forged_sites(draw: random.Random, folder: Path) -> None:
    """Change the sites: patterns, a million, the same ones twice."""
    said = card_of(folder)
    module = said["modules"][-1] if "modules" in said else said
    sites = module["sites"]
    module["sites"] = draw.choice(
        [
            ["*"],
            ["bert.*"],
            ["query"],
            sites * 2,
            sites[::-1],
            [],
            [""],
            ["/etc"],
            ["bert.encoder"],
            [f"bert.{i}" for i in range(10**6 if draw.random() < 0.1 else 10**4)],
            ["*" * 10**4],
            ["bert.encoder.layer.{0,1}.attention.self.query"],
            [s + "[0/3]" for s in sites],
            [s + "[residual]" for s in sites],
            sites[:1],
            [s.replace("0", "00") for s in sites],
        ]
    )
    put_card(folder, said)


def forged_type(draw: random.Random, folder: Path) -> None:
    """Make it a module of another class, of a size that no memory has."""
    said = card_of(folder)
    module = said["modules"][-1] if "modules" in said else said
    module["type"], module["config"] = draw.choice(
        [
            ("GatedFusion", {"dim": 3 * 10**7}),
            ("LoRA", {"rank": 10**9}),
            ("LoRA", {"rank": 2**62}),
            ("Adapter", {"reduction": 1e-300}),
            ("SoftPrompt", {"length": 10**9}),
            ("LoRA", {"rank": 10**5}),
            ("Prefix", {"length": 10**8}),
            ("Prefix", {"length": 10, "bottleneck": 10**9}),
            ("Adapter", {}),
            ("Mixture", {"modules": ["a"] * 10**4, "router": {"type": "TopK", "config": {"k": 1}}}),
            ("IntrinsicDimension", {"dim": 10**9}),
            ("Host", {}),
            ("Computation", {}),
            ("os.system", {}),
            ("__import__", {}),
            ("LoRA", {"rank": {"type": "LoRA", "config": {}}}),
            ("SparseDelta", {}),
        ]
    )
    put_card(folder, said)


def forged_tensors(draw: random.Random, folder: Path) -> None:
    """Change tensors, with hashes that agree: other types, shapes, names, values."""
    tensors, metadata = read(folder / FILE)
    name = draw.choice([name for name, t in tensors.items() if t.numel()] or list(tensors))
    old = tensors[name]
    what = draw.randrange(8)
    if what == 0:
        kinds = [torch.int64, torch.bool, torch.uint8, torch.float64, torch.float16, torch.int8]
        tensors[name] = old.to(draw.choice(kinds))
    elif what == 1:
        tensors[name] = torch.full(
            old.shape, draw.choice([1e300, -1e39, 1e38]), dtype=torch.float64
        )
    elif what == 2 and old.is_floating_point():
        tensors[name] = torch.full_like(
            old, draw.choice([float("nan"), float("inf"), -float("inf")])
        )
    elif what == 3:
        tensors[draw.choice(NAMES[:-1])] = tensors.pop(name)
    elif what == 4:
        del tensors[name]
    elif what == 5:
        shapes = [
            old.reshape(-1),
            old[None],
            old.repeat(2, *[1] * (old.dim() - 1)),
            old[:0],
            old[None].mT,
        ]
        tensors[name] = draw.choice(shapes).contiguous()
    elif what == 6:
        tensors[f"{name}2"] = old.clone()
    else:
        tensors[name] = (old + draw.choice([0.5, 1, 2**31, -5])).to(
            draw.choice([old.dtype, torch.float64])
        )
    (folder / FILE).write_bytes(save(tensors, metadata))
    if has_hash(folder):
        put_card(folder, json.loads(metadata["modgraft"]) | {"tensors": digest_of(tensors)})


def has_hash(folder: Path) -> bool:
    return folder.name != "former"


def card_of(folder: Path) -> dict[str, Any]:
    if not has_hash(folder):
        return json.loads((folder / "module.json").read_text())
    return json.loads(read(folder / FILE)[1]["modgraft"])


def put_card(folder: Path, said: dict[str, Any]) -> None:
    """Write a card, of whatever JSON is in it, with its hash."""
    said.pop("sha256", None)
    if not has_hash(folder):
        (folder / "module.json").write_text(json.dumps(said))
        return
    head, data = split((folder / FILE).read_bytes())
    head["__metadata__"] = {
        "format": "pt",
        "modgraft": json.dumps(said | {"sha256": card_digest(said)}),
    }
    (folder / FILE).write_bytes(joined(head, data))


DAMAGES: tuple[Damage, ...] = (
    bits,
    bits,
    sizes,
    header,
    header,
    length,
    bomb,
    no_file,
    forged_card,
    forged_card,
    forged_sites,
    forged_type,
    forged_tensors,
    forged_tensors,
)


# -- what comes of it -----------------------------------------------------------------------------


def outcome(host: mg.Host, folder: Path, original: dict[str, Tensor]) -> str:
    """Load a folder, and say what came of it.

    Raises:
        AssertionError: for other tensors than the file's, or a host that is left changed.
    """
    lazy = folder.stat().st_ino % 3 == 0
    try:
        host.load(folder, lazy=True) if lazy else host.load(folder)
        if lazy:
            for name in list(host._waiting):
                host.use(name)
    except mg.ModgraftError as error:
        for name in list(host._waiting):
            host.remove(name)
        assert not host.implants, f"left behind: {list(host.implants)}"
        assert host.composition is None
        return "refused" if str(folder) in str(error) else f"refused without the folder: {error}"
    tensors = {f"{n}:{k}": t for n, i in host._implants.items() for k, t in i.tensors().items()}
    there = {k: t for k, t in load((folder / FILE).read_bytes()).items() if k[:1] != ":"}
    if not has_hash(folder):
        there = {f"{next(iter(host.implants))}:{k}": t for k, t in there.items()}
    assert tensors.keys() == there.keys(), "tensors that are not in the file"
    for name, tensor in tensors.items():
        assert torch.equal(tensor, there[name].to(tensor.dtype)), f"{name} is not the file's"
        assert torch.isfinite(tensor).all()
    same = all(
        k in original and torch.equal(t, original[k].to(t))
        for k, t in tensors.items()
        if original.get(k, t).shape == t.shape
    )
    host.use(None)
    for name in reversed(list(host.implants)):
        host.remove(name)
    return "loaded, as it was" if same else "loaded, as it was forged"


def main(count: int, seed: int = 0) -> int:
    """Try ``count`` damaged folders; print what came of them, and return how many went wrong."""

    def too_long(*_: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGPROF, too_long)
    root = Path(tempfile.mkdtemp())
    seen, wrong, slowest = Counter[str](), 0, 0.0
    try:
        made = folders(root)
        tensors = {folder: load((folder / FILE).read_bytes()) for folder in made}
        tensors[made[-1]] = {f"a:{key}": tensor for key, tensor in tensors[made[-1]].items()}
        host = fresh()
        before = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
        for folder in made:  # unharmed, and to warm up
            assert outcome(host, folder, tensors[folder])[:6] == "loaded"
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        data = 1024 * int(status["VmData"].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (data + ROOM, data + ROOM))
        for i in range(count):
            draw = random.Random(1000003 * seed + i)
            source, damage = draw.choice(made), draw.choice(DAMAGES)
            trial = root / "trial" / source.name
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(source, trial)
            try:
                damage(draw, trial)
            except UnicodeEncodeError:  # a name that no file can have
                continue
            start = time.process_time()
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.alarm(60)  # it waits for something
                found = outcome(host, trial, tensors[source])
                assert "without" not in found, found
                if damage in (bits, sizes, length) and found != "refused":
                    assert found == "loaded, as it was", found
            except BaseException as error:  # noqa: BLE001
                wrong += 1
                found = f"WRONG: {type(error).__name__}"
                at = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    f"{i} {damage.__name__} of {source.name}: {type(error).__name__} "
                    f"{str(error)[:150]} at {at.filename}:{at.lineno}"
                )
                host = fresh()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
            slowest = max(slowest, time.process_time() - start)
            seen[f"{damage.__name__}: {found}"] += 1
        after = host.model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    finally:
        shutil.rmtree(root, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{sum(seen.values())} folders, {wrong} wrong; slowest {slowest:.2f} s, peak {peak:.0f} MiB"
    )
    for what, number in sorted(seen.items()):
        print(f"  {number:6} {what}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]))))
