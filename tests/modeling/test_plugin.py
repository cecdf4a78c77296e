"""Importing the package is cheap, and registers the plug-in whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moe_compress


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_brings_neither_torch_nor_transformers() -> None:
    assert run("import sys, moe_compress; print({'torch', 'transformers'} & set(sys.modules))") == "set()"


_CHECK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
import inspect, sys, transformers.quantizers.auto as registry
assert "def register_quantizer" in inspect.getsource(registry)
for loader in (registry.__loader__, registry.__spec__.loader):
    assert "moe_compress" not in type(loader).__module__
assert not [finder for finder in sys.meta_path if "moe_compress" in type(finder).__module__]
print(AUTO_QUANTIZATION_CONFIG_MAPPING["shared_core"].__name__, AUTO_QUANTIZER_MAPPING["shared_core"].__name__)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import transformers.quantizers.auto; import moe_compress",
        "import moe_compress; from transformers import AutoModelForCausalLM",
        "from moe_compress.modeling import load_model",
    ],
)
def test_registers_in_any_order(first: str) -> None:
    assert run(first + "\n" + _CHECK) == "SharedCoreConfig SharedCoreQuantizer"


def test_the_public_names_exist() -> None:
    from moe_compress import modeling

    for module in (moe_compress, modeling):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018
    assert set(modeling.__all__) == set(modeling._HOME)
