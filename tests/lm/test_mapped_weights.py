"""Memory of weights that are mapped from their file goes back to the system; what was written into
such memory stays."""

import os
import sys

import pytest
import torch
import transformers

from fastsae.lm import cpu_kernels, decoders, mapped_weights

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says it")
CONFIG = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
)


@pytest.fixture
def mapped(tmp_path):
    """A model of 13 MB that was read from a file."""
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        with open(file, "rb") as written:
            os.fsync(written.fileno())  # what is not yet on the disk counts as written to
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()


def resident(folder):
    """Bytes of the folder's files of weights that are in memory as ours."""
    total, is_there = 0, False
    with open(mapped_weights.SMAPS, encoding="utf-8") as lines:
        for line in lines:
            name, *rest = line.split()
            if not name.endswith(":"):
                is_there = str(folder) in line
            elif name == "Rss:" and is_there:
                total += 1024 * int(rest[0])
    return total


def test_packed_blocks_leave_no_pages_behind(mapped, tmp_path):
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = mapped(ids).logits
    before = resident(tmp_path)
    assert before > 12e6
    held = [*mapped.parameters()]  # the file stays mapped
    cpu_kernels.quicken(decoders.decoder_stack(mapped))
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("nothing is packed on this machine")
    assert resident(tmp_path) < 1e6
    with torch.inference_mode():
        torch.testing.assert_close(mapped(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert float(held[1].detach().sum()) != 0 and resident(tmp_path) > before / 20  # read again


def test_what_was_written_is_kept(mapped, tmp_path):
    """A page that was written to is in memory only: given back, it would be the file's again."""
    block = mapped.model.layers[0].mlp
    other = mapped.model.layers[1].mlp.up_proj.weight
    assert mapped_weights.clean_mappings()
    with torch.no_grad():
        block.up_proj.weight[500] = 7
    mapped_weights.give_back(
        [block.up_proj.weight, block.gate_proj.weight, other], mapped_weights.clean_mappings()
    )
    assert (block.up_proj.weight[500] == 7).all()


def test_memory_that_is_no_file_is_left_alone():
    weight = torch.ones(1 << 20)
    mapped_weights.give_back([weight], mapped_weights.clean_mappings())
    mapped_weights.give_back([weight], [])
    assert (weight == 1).all()
