"""Stochastic rounding goes to a neighbor, keeps the mean, and draws numbers that do not depend on the layout."""

import pytest
import torch

from litgpt.train.state_formats import FORMATS
from litgpt.train.stochastic_rounding import Noise, round_root_stochastically, round_stochastically

CPU = torch.device("cpu")


def uniform(count: int, seed: int = 1) -> torch.Tensor:
    return Noise((count,), (0,), (count,), seed, CPU).draw()


def test_the_numbers_are_uniform_and_differ_by_seed_and_call() -> None:
    noise = Noise((200, 1000), (0, 0), (200, 1000), 7, CPU)
    draws = [noise.draw(), noise.draw(), noise.draw(), Noise((200, 1000), (0, 0), (200, 1000), 8, CPU).draw()]
    for number, draw in enumerate(draws):
        counts = torch.histc(draw, 50, 0, 1)
        assert draw.min() > 0 and draw.max() < 1
        assert ((counts - 4000).square() / 4000).sum() < 100  # chi-squared with 49 degrees of freedom
        for other in draws[:number]:
            assert torch.corrcoef(torch.stack([draw.flatten(), other.flatten()]))[0, 1].abs() < 0.01
        neighbors = torch.stack([draw.flatten()[1:], draw.flatten()[:-1]])
        assert torch.corrcoef(neighbors)[0, 1].abs() < 0.01


@pytest.mark.parametrize("shape", [(7,), (6, 10), (3, 6, 10)])
def test_a_block_has_the_numbers_of_the_full_tensor(shape: tuple[int, ...]) -> None:
    full = Noise(shape, (0,) * len(shape), shape, 3, CPU).draw()
    offset = tuple(size // 2 for size in shape)
    sizes = tuple(size - start for size, start in zip(shape, offset, strict=True))
    block = Noise(sizes, offset, shape, 3, CPU).draw()
    assert torch.equal(block, full[tuple(slice(start, None) for start in offset)])


def test_tensors_of_more_than_four_billion_elements_have_numbers() -> None:
    shape = (2, 70_000, 40_000)
    far = Noise((1, 2, 3), (1, 69_998, 39_997), shape, 3, CPU)
    expected = [
        (70_000 * 40_000 + row * 40_000 + column) % 2**32
        for row in (69_998, 69_999)
        for column in range(39_997, 40_000)
    ]
    assert [int(index) % 2**32 for index in far.index.flatten()] == expected


@pytest.mark.parametrize(("dtype", "bits", "smallest"), [
    (torch.bfloat16, 7, 2.0**-100), (torch.float16, 10, 2.0**-14), (torch.float8_e4m3fn, 3, 2.0**-6),
])  # fmt: skip
def test_values_go_to_a_neighbor_and_keep_their_mean(dtype: torch.dtype, bits: int, smallest: float) -> None:
    drawn = torch.randn(4, 60, generator=torch.Generator().manual_seed(4)) * 10.0 ** -torch.arange(4)[:, None]
    values = torch.cat([drawn.flatten(), torch.tensor([0.0, 1.0, -2.0])])
    count = 40_000
    many = values.repeat_interleave(count)
    rounded = round_stochastically(many, uniform(len(many)), mantissa_bits=bits, smallest=smallest)
    assert torch.equal(rounded.to(dtype).float(), rounded)  # numbers of the format
    rounded = rounded.view(-1, count).double()
    low, high = rounded.amin(1), rounded.amax(1)
    assert ((low <= values) & (values <= high)).all()
    spacing = (high - low).clamp(min=1e-12)
    assert (rounded.unique(dim=1).shape[1] > 1) and (high[-3:] == low[-3:]).all()  # exact numbers stay
    assert ((rounded.mean(1) - values) / spacing).abs().max() < 5 * 0.5 / count**0.5


def test_squares_of_rounded_roots_keep_their_mean_and_are_not_zero() -> None:
    drawn = torch.rand(300, generator=torch.Generator().manual_seed(4))
    roots = torch.cat([drawn[:200] * 200, drawn[200:] * 2**-5, torch.tensor([0.0, 2.0**-12])])
    count = 40_000
    many = roots.repeat_interleave(count)
    rounded = round_root_stochastically(many, uniform(len(many)), mantissa_bits=3, smallest=2.0**-6)
    assert torch.equal(rounded.to(torch.float8_e4m3fn).float(), rounded)
    squares = rounded.view(-1, count).double().square()
    spread = (squares.amax(1) - squares.amin(1)).clamp(min=1e-12)
    large = roots >= 2**-9
    assert ((squares.mean(1) - roots.double().square()) / spread)[large].abs().max() < 5 * 0.5 / count**0.5
    assert (squares[-2] == 0).all() and (squares[-1] == 2.0**-18).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("signed", [True, False])
def test_what_is_read_is_what_was_written(name: str, signed: bool) -> None:
    if name in ("8bit", "4bit"):
        pytest.importorskip("torchao")
    state_format = FORMATS[name]
    torch.manual_seed(0)
    values = torch.randn(64, 256) * torch.logspace(-12, 3, 64)[:, None]
    values = values if signed else values.square()
    tensors = state_format.list_tensors(state_format.block)
    stored = {suffix: torch.zeros(64, 256 // one.values, dtype=one.dtype) for suffix, one in tensors.items()}
    if name == "fp32":
        stored[""].copy_(values)
    state_format.write(stored, values, Noise((64, 256), (0, 0), (64, 256), 1, CPU), signed=signed)
    errors = (state_format.read(stored, signed=signed) - values).double().norm(dim=1) / values.double().norm(dim=1)
    error = errors.median()  # scales of torchao are 1e-12 or more, so the smallest rows have larger errors
    assert error <= {"fp32": 0, "bf16": 2**-7, "fp16": 2**-9, "fp8": 0.1, "8bit": 0.02, "4bit": 0.25}[name]
    assert error > 0 or name == "fp32"
