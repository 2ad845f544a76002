"""A layer as one call of native code gives the bits of the calls of its parts, and fills the pools as they do."""

from collections.abc import Callable

import pytest
import torch

from pipeline.kernels import decoder_layer, packed, rowwise
from pipeline.kernels.attention import attend_one, attend_prompts
from pipeline.kernels.decoder_layer import AttentionParts, DecoderLayer, MlpParts, Norm, Rows
from pipeline.kernels.native import native
from pipeline.kernels.packed import PackedWeight
from pipeline.kernels.plain import in_plain_blocks

needs_compiler = pytest.mark.skipif(native(decoder_layer.SOURCE).library is None, reason="no C compiler")
HIDDEN, INNER, HEADS, KEY_HEADS, SIZE = 128, 192, 6, 2, 32


def plain(outputs: int, inputs: int) -> packed.Layer:
    return in_plain_blocks((torch.randn(outputs, inputs) * inputs**-0.5).bfloat16().float()).layer()


def quantized(bits: int, *, int8: bool = False) -> Callable[[int, int], packed.Layer]:
    def layer(outputs: int, inputs: int) -> packed.Layer:
        codes = torch.randint(-(2**31), 2**31 - 1, (outputs // 32, inputs * bits // 32, 32)).to(torch.int32)
        scales = torch.rand(outputs // 32, inputs // 32, 32).half() * 2**-bits * 0.2
        return PackedWeight(codes, scales, bits).layer(int8=int8)

    return layer


@needs_compiler
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [plain, quantized(4), quantized(8), quantized(4, int8=True)])
@pytest.mark.parametrize("joined", [True, False])
def test_a_layer_gives_the_bits_of_its_parts(
    joined: bool, make: Callable[[int, int], packed.Layer], dtype: torch.dtype, normed: bool, window: int | None
) -> None:
    torch.manual_seed(5)
    width, key_width = HEADS * SIZE, KEY_HEADS * SIZE
    sizes = [width + 2 * key_width] if joined else [width, key_width, key_width]
    weights = [torch.rand(size) + 0.5 for size in (HIDDEN, HIDDEN, SIZE, SIZE)]
    norms = (weights[2], weights[3]) if normed else (None, None)
    projections = [make(size, HIDDEN) for size in sizes]
    attends = AttentionParts(projections, make(HIDDEN, width), norms, 1e-6, HEADS, KEY_HEADS, SIZE, 0.3, window)
    mlp = MlpParts(make(INNER, HIDDEN), make(INNER, HIDDEN), make(HIDDEN, INNER))
    first, second = Norm(weights[0], 1e-5), Norm(weights[1], 1e-4)
    if not DecoderLayer.is_served(attends, mlp, dtype):  # rows of bfloat16 where nothing multiplies them
        pytest.skip("not for this processor or these rows")

    # Two sequences that decode at places 4 and 30, and parts of two prompts, one from its beginning.
    spans = torch.tensor([[2, 7, 40, 0], [9, 3, 60, 5]])
    places = torch.tensor([4, 30, *range(40, 47), *range(65, 68)])
    starts, lengths = torch.tensor([0, 20]), torch.tensor([5, 11])
    x = torch.randn(12, HIDDEN).to(dtype)
    angles = (torch.rand(12, SIZE).to(dtype), torch.rand(12, SIZE).to(dtype))
    pools = [torch.randn(70, KEY_HEADS, SIZE).to(dtype) for _ in range(2)]
    own, others = [pool.clone() for pool in pools], [pool.clone() for pool in pools]

    rows = Rows(places, starts, lengths, None, spans)
    rows.room(1 << 20).fill_(255)  # NaN in every type: nothing of another layer is read
    found = DecoderLayer(first, attends, second, mlp, dtype)(x, rows, angles, (own[0], own[1]))

    normal = rowwise.norm(x, *first)
    projected = [packed.multiply(normal, one) for one in projections]
    query, key, value = projected[0].split([width, key_width, key_width], dim=-1) if joined else projected
    rotated = rowwise.rotate(query, key, value, angles, norms, 1e-6, (others[0], others[1]), places)
    attended = attend_prompts(rotated, *others, spans, 0.3, window)
    attended[:2] = attend_one(rotated[:2], *others, starts, lengths, 0.3, window)
    between = packed.multiply(attended.flatten(1), attends.output, x)
    inner = packed.multiply(rowwise.norm(between, *second), mlp.gate, up=mlp.up)
    assert torch.equal(found, packed.multiply(inner, mlp.down, between))
    assert torch.equal(own[0], others[0])
    assert torch.equal(own[1], others[1])
    assert not torch.equal(own[0], pools[0])


@needs_compiler
def test_heads_too_large_for_the_native_code_are_not_served() -> None:
    size = 544
    attends = AttentionParts([plain(3 * size, 32)], plain(32, size), (None, None), 0.0, 1, 1, size, 0.1, None)
    mlp = MlpParts(plain(64, 32), plain(64, 32), plain(32, 64))
    assert not DecoderLayer.is_served(attends, mlp, torch.float32)
    small = attends._replace(projections=[plain(96, 32)], output=plain(32, 32), size=32)
    assert DecoderLayer.is_served(small, mlp, torch.float32)
