"""StyleGAN2 and e4e against loops, other forms of the same convolutions, and the layouts of public files."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines.large.e4e import Encoder, load_encoder
from baselines.large.stylegan2 import (
    Discriminator,
    EqualLinear,
    Generator,
    ModulatedConv2d,
    ResidualBlock,
    blur_kernel,
    load_generator,
    num_rows,
    resample,
)


def counts(module):
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), len(parameters), len(list(module.buffers()))


# Numbers of parameters, of tensors among them, and of buffers of the public models.
NETWORKS = {
    64: ((27_032_600, 82, 17), (26_488_833, 28, 8)),
    128: ((29_328_669, 96, 21), (28_389_121, 33, 10)),
    256: ((30_034_338, 110, 25), (28_864_129, 38, 12)),
    512: ((30_276_583, 124, 29), (28_982_849, 43, 14)),
    1024: ((30_370_060, 138, 33), (29_012_513, 48, 16)),
}
ENCODERS = {256: (209_450_688, 409, 156), 512: (238_293_696, 437, 156), 1024: (267_136_704, 465, 156)}


@pytest.mark.parametrize("size", NETWORKS)
def test_networks_are_of_the_published_sizes(size):
    with torch.device("meta"):
        assert (counts(Generator(size)), counts(Discriminator(size))) == NETWORKS[size]


@pytest.mark.parametrize("size", ENCODERS)
def test_encoders_are_of_the_published_sizes(size):
    with torch.device("meta"):
        assert counts(Encoder(size)) == ENCODERS[size]


def test_names_and_shapes_are_those_of_the_public_files():
    with torch.device("meta"):
        generator, discriminator, encoder = Generator(256), Discriminator(256), Encoder(256)
    for module, shapes in (
        (
            generator,
            {
                "style.1.weight": (512, 512),
                "style.8.bias": (512,),
                "input.input": (1, 512, 4, 4),
                "conv1.conv.weight": (1, 512, 512, 3, 3),
                "conv1.conv.modulation.bias": (512,),
                "conv1.noise.weight": (1,),
                "conv1.activate.bias": (512,),
                "to_rgb1.conv.weight": (1, 3, 512, 1, 1),
                "to_rgb1.bias": (1, 3, 1, 1),
                "convs.8.conv.weight": (1, 256, 512, 3, 3),
                "convs.8.conv.blur.kernel": (4, 4),
                "convs.11.conv.weight": (1, 128, 128, 3, 3),
                "to_rgbs.5.conv.modulation.weight": (128, 512),
                "to_rgbs.0.upsample.kernel": (4, 4),
                "noises.noise_0": (1, 1, 4, 4),
                "noises.noise_1": (1, 1, 8, 8),
                "noises.noise_12": (1, 1, 256, 256),
            },
        ),
        (
            discriminator,
            {
                "convs.0.0.weight": (128, 3, 1, 1),
                "convs.0.1.bias": (128,),
                "convs.1.conv1.0.weight": (128, 128, 3, 3),
                "convs.1.conv1.1.bias": (128,),
                "convs.1.conv2.0.kernel": (4, 4),
                "convs.1.conv2.1.weight": (256, 128, 3, 3),
                "convs.1.conv2.2.bias": (256,),
                "convs.1.skip.0.kernel": (4, 4),
                "convs.1.skip.1.weight": (256, 128, 1, 1),
                "final_conv.0.weight": (512, 513, 3, 3),
                "final_conv.1.bias": (512,),
                "final_linear.0.weight": (512, 8192),
                "final_linear.1.bias": (1,),
            },
        ),
        (
            encoder,
            {
                "input_layer.0.weight": (64, 3, 3, 3),
                "input_layer.1.running_mean": (64,),
                "input_layer.2.weight": (64,),
                "body.3.shortcut_layer.0.weight": (128, 64, 1, 1),
                "body.3.shortcut_layer.1.weight": (128,),
                "body.3.res_layer.0.weight": (64,),
                "body.3.res_layer.1.weight": (128, 64, 3, 3),
                "body.3.res_layer.2.weight": (128,),
                "body.3.res_layer.3.weight": (128, 128, 3, 3),
                "body.23.res_layer.4.running_var": (512,),
                "body.23.res_layer.5.fc1.weight": (32, 512, 1, 1),
                "body.23.res_layer.5.fc2.weight": (512, 32, 1, 1),
                "styles.0.convs.6.weight": (512, 512, 3, 3),
                "styles.3.convs.8.bias": (512,),
                "styles.13.convs.10.weight": (512, 512, 3, 3),
                "styles.13.linear.weight": (512, 512),
                "latlayer1.weight": (512, 256, 1, 1),
                "latlayer2.bias": (512,),
            },
        ),
    ):
        state = module.state_dict()
        assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "body.0.shortcut_layer.0.weight" not in encoder.state_dict()
    assert [name for name, _ in generator.named_buffers() if "kernel" in name and ".9." in name] == []


def filtered(picture, kernel, up, padding):
    """Zero-insert, pad and correlate with the flipped kernel, pixel by pixel."""
    height, width = picture.shape
    wide = np.zeros((height * up + sum(padding), width * up + sum(padding)))
    for y in range(height):
        for x in range(width):
            wide[y * up + padding[0], x * up + padding[0]] = picture[y, x]
    size = len(kernel)
    out = np.zeros((wide.shape[0] - size + 1, wide.shape[1] - size + 1))
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            for i in range(size):
                for j in range(size):
                    out[y, x] += wide[y + i, x + j] * kernel[size - 1 - i, size - 1 - j]
    return out


@pytest.mark.parametrize(("up", "padding"), [(1, (1, 1)), (1, (2, 2)), (2, (2, 1))])
def test_resampling_against_loops(up, padding):
    rng = np.random.default_rng(0)
    pictures, kernel = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(4, 4))  # not symmetric: flips show
    got = resample(torch.tensor(pictures), torch.tensor(kernel), up, padding)
    expected = [[filtered(channel, kernel, up, padding) for channel in picture] for picture in pictures]
    np.testing.assert_allclose(got.numpy(), np.array(expected), rtol=0, atol=1e-12)


def test_the_filter_is_binomial_and_keeps_the_mean():
    expected = [[a * b / 64 for b in (1, 3, 3, 1)] for a in (1, 3, 3, 1)]
    torch.testing.assert_close(blur_kernel(), torch.tensor(expected))
    assert float(blur_kernel(4).sum()) == pytest.approx(4)
    picture = resample(torch.full((1, 1, 8, 8), 0.7), blur_kernel(4), up=2, padding=(2, 1))
    assert picture.shape == (1, 1, 16, 16)
    torch.testing.assert_close(picture[..., 2:-2, 2:-2], torch.full((1, 1, 12, 12), 0.7))


def grouped(conv, x, style):
    """The paper's form: every picture has weights of its own, scaled by its style, and demodulated."""
    batch, _, height, width = x.shape
    weight = conv.weight / math.sqrt(conv.weight[0, 0].numel()) * style[:, None, :, None, None]
    if conv.demodulate:
        weight = weight / (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if conv.blur is None:
        x = F.conv2d(x.reshape(1, -1, height, width), weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=batch)
        return x.reshape(batch, -1, height, width)
    # Transposed convolution as it is defined: every input pixel puts a scaled copy of the weights, two pixels apart.
    out = x.new_zeros(batch, weight.shape[1], 2 * height + 1, 2 * width + 1)
    for i in range(height):
        for j in range(width):
            out[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += torch.einsum("bi,boihw->bohw", x[:, :, i, j], weight)
    return resample(out, blur_kernel(4), padding=(1, 1))


@pytest.mark.parametrize(
    ("kernel_size", "demodulate", "upsample"), [(3, True, False), (3, True, True), (1, False, False)]
)
def test_scaling_the_input_is_scaling_the_weights(kernel_size, demodulate, upsample):
    torch.manual_seed(0)
    conv = ModulatedConv2d(6, 5, kernel_size, 8, demodulate, upsample)
    x, style = torch.randn(3, 6, 7, 7), torch.randn(3, 6) + 1
    got, expected = conv(x, style), grouped(conv, x, style)
    assert got.shape == (3, 5, 14, 14) if upsample else (3, 5, 7, 7)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), conv.weight)[0] for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_equalised_layers_by_hand():
    torch.manual_seed(0)
    layer, x = EqualLinear(3, 2, bias_init=1, lr_mul=0.01, activate=True), torch.randn(4, 3)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    assert np.abs(weight).mean() > 10  # N(0, 1) / lr_mul
    for row, got in zip(x.numpy(), layer(x).detach().numpy(), strict=True):
        y = weight @ row * 0.01 / math.sqrt(3) + bias * 0.01
        np.testing.assert_allclose(got, math.sqrt(2) * np.where(y > 0, y, 0.2 * y), rtol=1e-5)


def test_a_residual_block_halves_by_blurred_strided_convolutions():
    torch.manual_seed(0)
    block, x = ResidualBlock(3, 5).double(), torch.randn(2, 3, 8, 8).double()

    def halved(x, weight, pad):
        blurred = np.array(
            [[filtered(c.detach().numpy(), blur_kernel().numpy(), 1, (pad, pad)) for c in picture] for picture in x]
        )
        size, out = weight.shape[-1], np.zeros((2, 5, 4, 4))
        for b, o, y, z in np.ndindex(out.shape):
            patch = blurred[b, :, 2 * y : 2 * y + size, 2 * z : 2 * z + size]
            out[b, o, y, z] = (patch * weight[o]).sum() / math.sqrt(weight[0].size)
        return out

    inner = F.conv2d(x, block.conv1[0].weight / math.sqrt(27), padding=1)
    inner = math.sqrt(2) * F.leaky_relu(inner + block.conv1[1].bias[:, None, None], 0.2)
    main = torch.tensor(halved(inner, block.conv2[1].weight.detach().numpy(), 2))
    main = math.sqrt(2) * F.leaky_relu(main + block.conv2[2].bias[:, None, None], 0.2)
    skip = torch.tensor(halved(x, block.skip[1].weight.detach().numpy(), 1))
    torch.testing.assert_close(block(x), (main + skip) / math.sqrt(2))


def test_the_spread_of_a_batch_is_that_within_its_groups():
    discriminator, x = Discriminator(8, channels=4), torch.randn(8, 4, 4, 4)
    got, expected = discriminator.spread(x), np.zeros(8)
    for first in (0, 1):  # pictures 0, 2, 4, 6 and 1, 3, 5, 7
        expected[first::2] = np.sqrt(x[first::2].numpy().var(axis=0) + 1e-8).mean()
    assert got.shape == (8, 1, 4, 4)
    np.testing.assert_allclose(got.numpy(), np.broadcast_to(expected[:, None, None, None], got.shape), rtol=1e-5)
    with pytest.raises(ValueError, match="batch of 6 pictures does not divide into groups of 4"):
        discriminator(torch.randn(6, 3, 8, 8))


@pytest.fixture
def small():
    """A narrow generator whose noise is felt."""
    torch.manual_seed(3)
    generator = Generator(32, style_dim=16, n_mlp=2, channels=8)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise.weight"):
                parameter.fill_(0.3)
    return generator


def test_codes_of_all_spaces_give_the_same_picture(small):
    w = small.style(torch.randn(3, 16))
    pictures = small(w)
    assert pictures.shape == (3, 3, 32, 32)
    assert torch.equal(small(w[:, None].expand(-1, num_rows(32), -1)), pictures)
    assert torch.equal(small.render(small.styles(w)), pictures)
    assert torch.equal(small(w), pictures)  # fixed noise
    assert not torch.equal(small(w, fresh_noise=True), pictures)
    assert [style.shape for style in small.styles(w)] == [(3, 8)] * 11
    assert [num_rows(size) for size in (8, 32, 256, 512, 1024)] == [4, 8, 14, 16, 18]


def test_styles_have_the_published_number_of_channels():
    with torch.device("meta"):
        for size, layers, channels in ((64, 14, 7168), (256, 20, 8704), (1024, 26, 9088)):
            styles = Generator(size).styles(torch.empty(1, 512))
            assert (len(styles), sum(style.shape[1] for style in styles)) == (layers, channels)


def test_every_style_reads_its_row_of_a_code(small):
    codes = torch.randn(1, 8, 16, requires_grad=True)
    read = []
    for style in small.styles(codes):
        (gradient,) = torch.autograd.grad(style.sum(), codes)
        read.append([row for row in range(8) if gradient[0, row].abs().sum() > 0])
    assert read == [[0], [1], [1], [2], [3], [3], [4], [5], [5], [6], [7]]


@pytest.mark.parametrize("shape", [(2, 15), (2, 7, 16), (2, 8, 17), (16,)])
def test_codes_of_other_shapes_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"takes W \(B, 16\) or W\+ \(B, 8, 16\)"):
        small(torch.zeros(shape))


def test_styles_of_other_shapes_are_refused(small):
    with pytest.raises(ValueError, match="this generator takes"):
        small.render(small.styles(torch.zeros(1, 16))[:-1])


@pytest.mark.parametrize("size", [4, 48, 2048, 32.0])
def test_sizes_that_are_no_powers_of_two_are_refused(size):
    for build in (Generator, Discriminator, Encoder):
        with pytest.raises(ValueError, match=r"size is .*; it must be a power of two from 8 to 1024"):
            build(size)


@pytest.mark.parametrize("arguments", [(32, 16, 2, 2, 8), (64, 16, 3, 2, 24), (256, 16, 2, 1, 80), (256, 16, 2, 2, 80)])
def test_a_public_file_loads(tmp_path, arguments):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        generator = Generator(*arguments)
    file, mean = tmp_path / "public.pt", torch.randn(16)
    torch.save({"g_ema": generator.state_dict(), "latent_avg": mean}, file)
    loaded, loaded_mean = load_generator(file)
    assert torch.equal(loaded_mean, mean)
    assert loaded.size == arguments[0]
    w = torch.randn(2, 16)
    assert torch.equal(loaded(w), generator(w))


def test_filters_and_noise_may_be_absent_and_a_mean_is_computed(tmp_path, small):
    state = {n: t for n, t in small.state_dict().items() if "kernel" not in n and "noises" not in n}
    assert len(state) == len(list(small.parameters()))
    torch.save({"g_ema": state}, tmp_path / "bare.pt")
    before = torch.get_rng_state()
    (first, mean), (second, _) = (load_generator(tmp_path / "bare.pt") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    w = torch.randn(1, 16)
    assert torch.equal(first(w), second(w))
    torch.testing.assert_close(first.convs[0].conv.blur.kernel, blur_kernel(4))
    torch.testing.assert_close(mean, small.mean_code())
    with torch.no_grad():
        many = small.style(torch.randn(20_000, 16))
    assert ((mean - many.mean(dim=0)).abs() < 6 * many.std(dim=0) / math.sqrt(4096)).all()


def without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("convs.1.conv.modulation.bias"), "convs.1.conv.modulation.bias is missing"),
        (without("to_rgbs.0.bias"), "to_rgbs.0.bias is missing"),
        (without("conv1.conv.weight"), "conv1.conv.weight is missing"),
        (without("style.1.weight"), "style.1.weight is missing"),
        (lambda s: s.update({"extra.weight": torch.zeros(2)}), "extra.weight is not of this model"),
        (lambda s: s.update({"style.1.bias": torch.zeros(5)}), r"style.1.bias has shape \(5,\), the model's \(16,\)"),
        (lambda s: s.update({"style.1.bias": torch.full((16,), torch.nan)}), "style.1.bias holds 16 numbers"),
        (lambda s: s.update({"noises.noise_0": torch.zeros(1, 1, 5, 5)}), "noises.noise_0 has shape"),
        (lambda s: s.update({"style.1.weight": torch.zeros(16, 16).byte()}), "style.1.weight is of uint8"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, small, change, message):
    state = small.state_dict()
    change(state)
    torch.save({"g_ema": state, "latent_avg": torch.zeros(16)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt: {message}"):
        load_generator(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"generator": {}}, "holds generator; a generator is in g_ema, or in state_dict"),
        ({"g_ema": [1]}, "g_ema is not a dictionary of tensors"),
        ({"state_dict": {"encoder.x": torch.zeros(1)}}, "style.1.weight is missing"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_generator(tmp_path / "x.pt")


def test_a_mean_code_of_another_width_is_refused(tmp_path, small):
    torch.save({"g_ema": small.state_dict(), "latent_avg": torch.zeros(17)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="latent_avg is no tensor of 16 numbers"):
        load_generator(tmp_path / "x.pt")


def narrow(differences=True):
    torch.manual_seed(5)
    encoder = Encoder(32, 16, 64, units=(1, 2, 1, 1), widths=(4, 6, 8, 10), differences=differences)
    for name, buffer in encoder.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return encoder.eval()


@pytest.mark.parametrize("kind", ["Encoder4Editing", "GradualStyleEncoder"])
def test_an_encoder_loads_with_its_generator(tmp_path, small, kind):
    encoder, mean = narrow(kind == "Encoder4Editing"), torch.randn(16)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"decoder.{name}": tensor for name, tensor in small.state_dict().items()}
    options = {"encoder_type": kind, "start_from_latent_avg": True, "stylegan_size": 32}
    torch.save({"state_dict": state, "opts": options, "latent_avg": mean.expand(8, 16)}, tmp_path / "e.pt")
    loaded, offset = load_encoder(tmp_path / "e.pt")
    generator, center = load_generator(tmp_path / "e.pt")
    assert torch.equal(offset, mean.expand(8, 16))
    assert torch.equal(center, mean)
    pictures = torch.randn(2, 3, 64, 64)
    assert not loaded.training
    assert torch.equal(loaded(pictures), encoder(pictures))
    assert generator(loaded(pictures) + offset).shape == (2, 3, 32, 32)

    del state["encoder.latlayer1.bias"]
    torch.save({"state_dict": state, "opts": options, "latent_avg": mean}, tmp_path / "e.pt")
    with pytest.raises(ValueError, match=r"e\.pt: latlayer1\.bias is missing"):
        load_encoder(tmp_path / "e.pt")
    state |= {"encoder.latlayer1.bias": torch.zeros(10), "encoder.more": torch.zeros(1)}
    torch.save({"state_dict": state, "opts": options, "latent_avg": mean}, tmp_path / "e.pt")
    with pytest.raises(ValueError, match="more is not of this model"):
        load_encoder(tmp_path / "e.pt")
    del state["encoder.more"]
    torch.save({"state_dict": state, "opts": options}, tmp_path / "e.pt")
    with pytest.raises(ValueError, match="latent_avg is no tensor of 16 numbers, or of 8 x 16"):
        load_encoder(tmp_path / "e.pt")
    torch.save({"state_dict": state, "opts": {**options, "start_from_latent_avg": False}}, tmp_path / "e.pt")
    assert torch.equal(load_encoder(tmp_path / "e.pt")[1], torch.zeros(8, 16))
    torch.save({"state_dict": state, "opts": {"encoder_type": "ResNet"}}, tmp_path / "e.pt")
    with pytest.raises(ValueError, match="encoder_type in opts is 'ResNet'; choose from Encoder4Editing, Gradual"):
        load_encoder(tmp_path / "e.pt")


def test_rows_of_e4e_are_the_first_plus_differences():
    """The same weights, read as e4e's and as pSp's; which level of the pyramid a row reads shows in its gradient."""
    both, single = narrow(True), narrow(False)
    pictures = torch.randn(2, 3, 64, 64)
    rows, by_itself = both(pictures), single(pictures)
    torch.testing.assert_close(rows[:, 0], by_itself[:, 0])
    torch.testing.assert_close(rows[:, 1:], by_itself[:, :1] + by_itself[:, 1:])
    reads = []
    for row in range(8):
        lateral = [single.latlayer1.weight, single.latlayer2.weight]
        found = torch.autograd.grad(single(pictures)[:, row].sum(), lateral, allow_unused=True)
        reads.append([gradient is not None and bool(gradient.abs().sum() > 0) for gradient in found])
    assert reads == [[False, False]] * 3 + [[True, False]] * 4 + [[True, True]]
    with pytest.raises(ValueError, match=r"takes \(B, 3, 64, 64\)"):
        both(torch.randn(2, 3, 32, 32))
