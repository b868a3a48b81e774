"""fp8: what it changes, what it leaves alone, where it refuses, and that its benchmark measures it."""

import importlib.util
import json
import logging
import re
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from ppllava import PPLlavaForConditionalGeneration, presets, quantization
from ppllava.quantization import fp8, fp8_linears, why_not_fp8

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import fp8 as benchmark
from benchmarks import fp8_report

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install torchao"
)


def in_fp8(weight):
    from torchao.quantization import Float8Tensor

    return isinstance(weight, Float8Tensor)


def build(name="tiny", dtype=torch.bfloat16):
    """(model, processor) of a preset, all weights with sides that are multiples of 16."""
    config = presets.preset_config(name)
    config.text_config.num_key_value_heads = config.text_config.num_attention_heads
    model = PPLlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    return model, presets.build_processor(config)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_torchao
@pytest.mark.parametrize("name", ["tiny", "tiny-btadapter", "tiny-qwen2"])
def test_layers_of_the_towers_and_nothing_else(name):
    model, processor = build(name)
    before = {name: x.clone() for name, x in model.named_parameters()}
    linears = {name for name, x in model.named_modules() if isinstance(x, nn.Linear)}
    changed = benchmark.emulate(deepcopy(model))
    quantised = {name for name, x in changed.named_parameters() if in_fp8(x)}
    expected = {
        f"{name}.weight"
        for name in linears
        if name.startswith(("model.vision_tower.", "model.language_model.")) and not name.endswith("lm_head")
    }
    assert quantised == expected
    assert {f"model.{name}.weight" for name in fp8_linears(model.model)} == expected
    assert {name.split(".")[1] for name in quantised} == {"vision_tower", "language_model"}
    for name, x in changed.named_parameters():
        if name not in quantised:
            assert torch.equal(x, before[name])
    assert changed.model.guide.logit_scale.dtype == torch.float32
    with torch.no_grad():  # a BT-Adapter and SigLIP, too, use their layers as modules
        given = next(benchmark.inputs(processor, 4, 1, "cpu"))
        assert changed(**given).logits.isfinite().all()


@needs_torchao
def test_the_formula():
    """y = (q(x) q(W)^T) * (s_x s_W^T) + b, up to the rounding of y, and far from the product of bfloat16."""
    model = build()[0]
    layer = model.model.vision_tower.encoder.layers[0].mlp.fc1
    nn.init.normal_(layer.bias)
    weight, bias = layer.weight.double(), layer.bias.double()
    benchmark.emulate(model)
    x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)

    def quantise(z):
        scale = z.float().abs().amax(-1, keepdim=True) / 448
        return (z.float() / scale).to(torch.float8_e4m3fn).double(), scale.double()

    (qx, sx), (qw, sw) = quantise(x), quantise(weight)
    expected = (qx @ qw.T) * (sx @ sw.T) + bias
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < torch.finfo(torch.bfloat16).eps
    assert (x.double() @ weight.T + bias - expected).norm() / expected.norm() > 2 * error


@needs_torchao
def test_rows_of_zeros_give_zeros():
    """Of the input, as for a padding token, and of the weight, as in an adapter before training."""
    model = build()[0]
    layer = model.model.vision_tower.encoder.layers[0].mlp.fc1
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight[3] = 0
    x = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16)
    x[0, 1] = 0
    expected = layer(x)  # zeros where they belong
    assert benchmark.emulate(model).model.vision_tower.encoder.layers[0].mlp.fc1 is layer
    actual = layer(x)
    assert actual[0, 1].eq(0).all()
    assert actual[..., 3].eq(0).all()
    assert (actual - expected).norm() < 0.1 * expected.norm()


@needs_torchao
def test_settings_of_the_process_stay(monkeypatch):
    names = "coordinate_descent_tuning", "coordinate_descent_check_all_directions", "force_fuse_int_mm_with_mul"
    for name in names:
        monkeypatch.setattr(torch._inductor.config, name, False)
    model = build()[0]
    assert benchmark.emulate(model) is model
    assert not any(getattr(torch._inductor.config, name) for name in names)


def test_torchao_is_imported_in_silence(monkeypatch, tmp_path, caplog):
    level = logging.getLogger("torchao").level  # benchmarks set it for good
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("import logging\nlogging.getLogger(__name__).warning('no GPU')\n")
    (tmp_path / "torchao" / "quantization.py").write_text("")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    logging.getLogger("torchao").setLevel(logging.NOTSET)
    assert Path(quantization._torchao().__file__).is_relative_to(tmp_path)
    assert caplog.text == ""
    assert logging.getLogger("torchao").level == logging.NOTSET
    logging.getLogger("torchao").setLevel(level)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.gpu
@needs_torchao
@pytest.mark.skipif(
    not torch.cuda.is_available() or why_not_fp8("cuda") is not None,
    reason="needs a GPU with fp8; run on sm_89 or newer",
)
def test_on_a_gpu():
    """The product of the GPU is the one that a CPU emulates; and the model answers."""
    model, processor = build()
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    emulated = benchmark.emulate(deepcopy(model)).model.vision_tower.encoder.layers[0].mlp.fc1(x)
    model = fp8(model.to("cuda"))
    actual = model.model.vision_tower.encoder.layers[0].mlp.fc1(x.to("cuda")).cpu()
    # Scales of the GPU may be off by a rounding, and a number next to a tie then falls on its other side.
    assert (actual - emulated).norm() < 0.02 * emulated.norm()
    given = next(benchmark.inputs(processor, 4, 1, "cuda"))
    assert model.generate(**given, max_new_tokens=3, min_new_tokens=3).shape[1] == given["input_ids"].shape[1] + 3


MISSING = (
    'fp8 needs torchao, which is not installed; in the folder of the sources, pip install --no-build-isolation ".[fp8]"'
)
GPU_NEEDED = "a CUDA GPU of compute capability 8.9 or newer"


def test_a_cpu_is_refused_and_nothing_changes(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: name)
    model = build()[0]
    before = {name: type(x) for name, x in model.named_parameters()}
    with pytest.raises(RuntimeError) as error:
        fp8(model)
    expected = f"fp8 needs the model on {GPU_NEEDED}, got it on cpu; move it there, or leave it in bfloat16"
    assert str(error.value) == expected
    assert {name: type(x) for name, x in model.named_parameters()} == before


def test_where_it_runs(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert why_not_fp8("cuda") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_not_fp8("cuda:0") == f"fp8 needs {GPU_NEEDED}, got NVIDIA A100 of 8.0; leave the model in bfloat16"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert why_not_fp8("cuda") == f"fp8 needs {GPU_NEEDED}, got a ROCm GPU; leave the model in bfloat16"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: name)
    assert "got none that PyTorch can use" in why_not_fp8("cuda")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    assert why_not_fp8("cuda") == MISSING


class Int8(nn.Parameter):
    """A weight of some other format."""


def already(model):
    layer = model.model.vision_tower.encoder.layers[0].mlp.fc1
    layer.weight = Int8(layer.weight.detach())
    return model


def changed_tower(model):
    model.model.vision_tower = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(dtype=torch.float32)[0], "model must be in bfloat16, got model.vision_tower.* in float32; load"),
        (
            lambda: presets.build("tiny", dtype=torch.bfloat16)[0],
            r"sides that are multiples of 16 .* model.language_model.*k_proj.weight of \[24, 48\]; leave",
        ),
        (lambda: already(build()[0]), "not be quantised already, got model.vision_tower.* of type Int8; call fp8 once"),
        (lambda: changed_tower(build()[0]), "fp8 is for layers of type nn.Linear, got Identity without any; leave"),
    ],
    ids=["float32", "sides", "twice", "no linear"],
)
def test_models_that_cannot_be_in_fp8(make, message):
    with pytest.raises(ValueError, match=message):
        fp8_linears(make())


def test_errors_by_hand():
    expected = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    actual = torch.tensor([[3.0, 4.5]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    found = benchmark.compare((actual[0], actual[1][1:]), (expected[0], expected[1][1:]))
    assert found["visual_error"] == pytest.approx(0.1)
    assert found["logits_error"] == pytest.approx(2**0.5)
    p = torch.tensor(2.0).sigmoid().item()
    assert found["kl"] == pytest.approx(2 * (2 * p - 1), rel=1e-5)  # sum of p log(p / q), whose logs differ by 2
    assert benchmark.compare(actual, expected)["equal_tokens"] == 0.5
    same = benchmark.compare(expected, expected)
    assert same == {"visual_error": 0, "logits_error": 0, "kl": 0, "equal_tokens": 1}
    both = benchmark.spread([found, same])
    assert both["visual_error"] == {"mean": pytest.approx(0.05), "worst": pytest.approx(0.1)}
    assert both["equal_tokens"] == {"mean": 0.5, "worst": 0}


def test_the_command_without_torchao(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "version", lambda package: None)
    with pytest.raises(SystemExit, match=f"^{re.escape(MISSING)}"):
        command(tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    for part in build():
        part.save_pretrained(folder)
    return folder


def command(folder, out, *arguments):
    return benchmark.main(["--model", str(folder), "--device", "cpu", "--out", str(out), *arguments])


@needs_torchao
def test_the_command(folder, tmp_path, capsys):
    assert command(folder, tmp_path / "here", "--frames", "2", "5") == 0
    result = json.loads((tmp_path / "here" / "fp8.json").read_text())
    assert result["protocol"]["emulated"]
    assert result["protocol"]["left_out"] == []
    assert [(row["frames"], row["visual_tokens"], row["samples"]) for row in result["rows"]] == [(2, 4, 3), (5, 8, 3)]
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["ms"] == {}
        assert row["weight_bytes"]["fp8"] < row["weight_bytes"]["bf16"]
        for name in ("visual_error", "logits_error", "kl"):
            fp8_, bf16 = (row["errors"][of][name]["mean"] for of in ("fp8", "bf16"))
            assert 0 < bf16 < fp8_ < 1, name
            assert row["errors"]["fp8"][name]["worst"] >= fp8_
        assert row["errors"]["fp8"]["equal_tokens"]["mean"] <= row["errors"]["bf16"]["equal_tokens"]["mean"] <= 1
    block = fp8_report.fp8_block(tmp_path, tmp_path)
    assert block.count("| fp8 against bf16 |") == block.count("| bf16 against float32 |") == 2
    assert "**CUDA GPU**: not measured yet." in block
    assert "**CPU**" not in block
    assert f"| {fp8_report.cells(result['rows'][0]['errors']['fp8'])[0]} |" in block
    assert "fp8 is emulated on a CPU" in capsys.readouterr().out
    assert fp8_report.fp8_block(tmp_path / "none", tmp_path).count("not measured yet") == 2


@needs_torchao
def test_what_is_not_in_fp8_is_wrong(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "emulate", lambda model: model)
    assert command(folder, tmp_path / "here", "--frames", "2") == 1
    assert "WRONG: 2 frames, 4 visual tokens: fp8 gave the bits of bfloat16" in capsys.readouterr().out
    block = fp8_report.fp8_block(tmp_path, tmp_path)
    assert "2 frames: wrong (fp8 gave the bits of bfloat16" in block
    assert "against bf16" not in block


@needs_torchao
def test_time_limit(folder, tmp_path):
    assert command(folder, tmp_path / "here", "--frames", "2", "5", "--time-limit", "0") == 0
    assert "Left out for lack of time: 2 frames, 5 frames." in fp8_report.fp8_block(tmp_path, tmp_path)


@needs_torchao
def test_times_of_every_part(tmp_path, monkeypatch):
    """On a GPU; here with the emulated model, whose times mean nothing."""
    monkeypatch.setattr(benchmark, "NEW_TOKENS", 3)
    model, processor = build()
    models = {"bf16": model, "fp8": benchmark.emulate(deepcopy(model))}
    row = benchmark.Fp8Row(frames=4, visual_tokens=4, samples=1, weight_bytes={"bf16": 2, "fp8": 1})
    benchmark.time_row(row, models, next(benchmark.inputs(processor, 4, 1, "cpu")), "cpu", compiled=False)
    assert row.failed == {"vision": {}, "prefill": {}, "token": {}}
    assert {part: list(times) for part, times in row.ms.items()} == {name: ["bf16", "fp8"] for name in fp8_report.PARTS}
    row.ms["vision"] = {"bf16": {"p50": 30.0}, "fp8": {"p50": 20.0}, "compile(bf16)": {"p50": 12.0}}
    row.failed["vision"] = {"compile(fp8)": "RuntimeError: no"}
    assert fp8_report.failures([row]) == [
        "FAILED: 4 frames, 4 visual tokens, vision tower, compile(fp8): RuntimeError: no"
    ]
    args = benchmark.parse(["--device", "cpu"])
    machine = benchmark.machine_info("cpu", ["python"]) | {"type": "cuda", "device": "a GPU"}
    benchmark.report.write(tmp_path / "gpu" / "fp8.json", "fp8", machine, benchmark.protocol(args, []), [row.as_dict()])
    block = fp8_report.fp8_block(tmp_path, tmp_path)
    assert "| 4 | vision tower | 30 | 20 | 1.5 | 12 | - | - |" in block
    assert "vision tower, compile(fp8): failed (RuntimeError: no)." in block
    assert "**CPU**: not measured yet." in block


def test_compiled_layers_share_the_weights():
    model = build()[0]
    twin = benchmark.compile_layers(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    compiled = [name for name, x in twin.named_modules() if x._compiled_call_impl is not None]
    towers = ("model.vision_tower.encoder.layers.0", "model.language_model.model.layers.1")
    assert set(towers) < set(compiled)
    assert not any(x._compiled_call_impl for x in model.modules())
