"""Networks of other tasks: public checkpoints fit strictly and give known answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import tones
from tests import nets, nets_dense
from tests.real import DATA, needs_data
from tests.test_nets import load, stock_state

FRAME = "camvid/test/{}/0001TP_009450.png"


def image(name: str, size: tuple[int, int] | None = None) -> Tensor:
    """Blue, green, red of one image (1, 3, H, W), 0..255."""
    picture = Image.open(DATA / name).convert("RGB")
    picture = picture.resize(size) if size else picture
    return torch.from_numpy(np.array(picture)[..., ::-1].copy()).permute(2, 0, 1)[None].float()


@needs_data
def test_espnet_fits_and_gives_the_known_count() -> None:
    net = load(nets_dense.espnet(), stock_state("odd/espnet_camvid.pth"))
    mean = torch.tensor(nets_dense.CAMVID_MEAN).view(3, 1, 1)
    x = (image(FRAME.format("images")) - mean) / nets_dense.CAMVID_STD / 255
    mask = torch.from_numpy(np.array(Image.open(DATA / FRAME.format("masks"))))
    with torch.inference_mode():
        guess = net(x)[0].argmax(0)
    valid = mask != 11
    assert int(valid.sum()) == 160_229
    # A few pixels may flip with another build of torch.
    assert abs(int((guess == mask)[valid].sum()) - 128_539) <= 50


@needs_data
def test_crepe_fits_and_hears_the_pitch() -> None:
    net = nets_dense.crepe_tiny().eval()
    net.load_state_dict(stock_state("odd/crepe_tiny.pth"), strict=True)
    frames, cents = tones.tones(60, seed=3)
    with torch.inference_mode():
        outputs = net(torch.from_numpy(frames)).numpy()
    assert tones.pitch_accuracy(outputs, cents) > 0.95
    assert tones.pitch_accuracy(outputs, cents + 60) < 0.2


@needs_data
def test_fastestdet_fits_and_finds_the_car() -> None:
    net = nets_dense.fastestdet().eval()
    net.load_state_dict(stock_state("odd/fastestdet.pth"), strict=True)
    with torch.inference_mode():
        found = net(image(FRAME.format("images"), (352, 352)) / 255)[0]
    assert found.shape == (85, 22, 22)
    place = found[0].argmax()
    assert found[0].max() > 0.5
    assert int(found[5:].flatten(1)[:, place].argmax()) == 2  # COCO's car


@pytest.mark.parametrize(
    ("build", "shape", "out"),
    [
        (nets_dense.espnet, (1, 3, 16, 24), (12, 16, 24)),
        (nets_dense.crepe_tiny, (2, 1, 1024, 1), (360,)),
        (nets_dense.fastestdet, (1, 3, 32, 64), (85, 2, 4)),
        (nets_dense.point_net, (3, 3, 7), (3,)),
        (nets_dense.recurrent, (3, 3, 5), (1,)),
        (nets_dense.tabular, (3, 10), (1,)),
        (nets_dense.volume, (2, 1, 3, 4, 5), (2, 3, 4, 5)),
        (nets_dense.generator, (2, 8, 1, 1), (3, 16, 16)),
    ],
)
def test_networks_take_their_input(
    build: Callable[[], nn.Module], shape: tuple[int, ...], out: tuple[int, ...]
) -> None:
    net = nets.lived_in(build()).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = net(inputs)
    assert found.shape == (shape[0], *out)
    assert found.isfinite().all()


def test_the_recurrent_net_stops_at_each_length() -> None:
    net = nets.lived_in(nets_dense.recurrent()).eval()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([4, 6])
    found = net(x, lengths)
    torch.testing.assert_close(found[:1], net(x[:1, :, :4]))
    assert not torch.equal(found[0], net(x)[0])


def test_tones_are_drawn_by_seed_and_have_the_pitch_they_say() -> None:
    frames, cents = tones.tones(8, seed=1)
    again, _ = tones.tones(8, seed=1)
    assert np.array_equal(frames, again)
    assert not np.array_equal(frames, tones.tones(8, seed=2)[0])
    np.testing.assert_allclose(frames.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(frames.std(1), 1, atol=1e-5)
    # The autocorrelation of a frame has a peak near the period of its pitch.
    for frame, pitch in zip(frames, cents, strict=True):
        lag = round(tones.RATE / (10 * 2 ** (pitch / 1200)))
        if lag < 200:
            near = [frame[:-k] @ frame[k:] / (frame @ frame) for k in range(lag - 2, lag + 3)]
            assert max(near) > 0.5


def test_the_telephones_band_keeps_what_is_inside() -> None:
    time = np.arange(3072) / tones.RATE
    for hertz, passes in ((100, 0), (1000, 1), (3000, 1), (5000, 0)):
        wave = np.sin(2 * np.pi * hertz * time)[None]
        kept = np.sqrt((tones.band_passed(wave) ** 2).mean() / (wave**2).mean())
        assert abs(kept - passes) < 0.1, hertz


def test_pitch_is_read_off_the_bins_and_the_loss_is_least_at_the_truth() -> None:
    cents = np.float32([2500.0, 4010.0, 9000.0])
    bins = tones.FIRST + tones.STEP * np.arange(360)
    bell = np.exp(-((bins - cents[:, None]) ** 2) / (2 * tones.SPREAD**2)).astype(np.float32)
    np.testing.assert_allclose(tones.cents_of(bell), cents, atol=1)
    assert tones.pitch_accuracy(bell, cents) == 1
    assert tones.pitch_accuracy(bell, cents + np.float32([0, 49, 52])) == pytest.approx(2 / 3)
    best, off = (tones.loss(torch.tensor(bell), torch.tensor(cents + d)) for d in (0, 30))
    assert best.shape == (3,)
    assert (best < off).all()
