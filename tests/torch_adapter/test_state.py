"""Moving, copying, saving and loading a layer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
from cases import KINDS, Weight, assert_same_weight, pack

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import ACTS, GROUPS, MARKS, Attention, expected, same

from pyda8w4.torch import DA8W4Linear, fuse_linears, quantize_

pytestmark = MARKS


def test_to_dtype_keeps_the_weights() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    want = layer(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for move in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.cpu, lambda m: m.type(torch.half)):
        assert move(layer) is layer
        assert all(same(value, before[name]) for name, value in layer.state_dict().items())
    assert same(layer.to(torch.bfloat16)(x), want)


def test_to_another_device_is_an_error() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = DA8W4Linear.from_linear(nn.Linear(64, 8))
    x = torch.randn(2, 64)
    want = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=r"CPU only.*cuda"):
        layer._apply(lambda t: torch.empty_like(t, device="cuda"))  # what .to("cuda") does, without a GPU
    assert same(layer(x), want)


def test_meta_and_back() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    x = torch.randn(2, 64)
    with torch.device("meta"):
        empty = DA8W4Linear(64, 40)
    assert empty.codes.is_meta
    with pytest.raises(ValueError, match="meta"):
        empty(x)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert same(empty(x), layer(x)) and empty.codes.data_ptr() == layer.codes.data_ptr()
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    assert same(moved(x), layer(x))


@pytest.mark.parametrize("zeros", ["float", "integer", "none"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", ["torch", "safetensors"])
def test_state_dict(zeros: str, assign: bool, way: str, tmp_path: Any) -> None:
    model = Attention(bias=True)
    quantize_(model, 32, zeros=zeros)
    x = torch.randn(2, 64)
    if way == "torch":
        torch.save(model.state_dict(), tmp_path / "s")
        state = torch.load(tmp_path / "s", weights_only=True)
    else:
        from safetensors.torch import load_file, save_file

        save_file(model.state_dict(), tmp_path / "s")
        state = load_file(tmp_path / "s")
    other = Attention(bias=True)
    quantize_(other, 16, zeros="integer" if zeros == "none" else "none")  # the state says what its groups are
    assert not same(other(x), model(x))
    other.load_state_dict(state, strict=True, assign=assign)
    assert same(other(x), model(x))
    assert (other.q_proj.codes.data_ptr() == state["q_proj.codes"].data_ptr()) == assign


@pytest.mark.parametrize("group_zero_points", [False, True])
def test_load_checkpoint_of_accelerate(group_zero_points: bool, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from safetensors.torch import save_file

    linear = nn.Linear(64, 40)
    model = nn.Sequential(DA8W4Linear.from_linear(linear, 32, zeros="integer" if group_zero_points else "none"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential(DA8W4Linear(64, 40, group_size=32, group_zero_points=group_zero_points))
    assert bool(empty[0].zps.dim()) == group_zero_points
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    x = torch.randn(2, 64)
    want = model(x)
    assert same(loaded(x), want)
    assert same(accelerate.cpu_offload(model, execution_device="cpu")(x), want)


@pytest.mark.parametrize("group_zero_points", [False, True])
@pytest.mark.parametrize("zeros", ["float", "integer", "none"])
def test_state_dict_decides_about_zero_points(group_zero_points: bool, zeros: str) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32, zeros=zeros)
    other = DA8W4Linear(64, 40, group_zero_points=group_zero_points)
    x = torch.randn(2, 64)
    assert not other(x).any()
    other.load_state_dict(layer.state_dict())
    assert same(other(x), layer(x)) and other.zps.shape == layer.zps.shape


def test_state_dict_that_does_not_fit() -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32, zeros="integer")
    x = torch.randn(2, 64)
    want, good = layer(x), layer.state_dict()
    changes: dict[str, Any] = {
        "layout": [torch.tensor([3, 40, 64, 32]), torch.tensor([1, 40, 60, 32]), torch.tensor([1, 40, 64, 30])],
        "codes": [good["codes"][:1], good["codes"].char(), good["codes"].to_sparse()],
        "scales": [good["scales"][:, :1], good["scales"].double()],
        "sums": [good["sums"].half()],
        "zps": [good["zps"][:1], good["zps"].int()],
        "bias": [torch.zeros(1)],
    }
    for name, values in changes.items():
        for value in values:
            with pytest.raises(RuntimeError, match=name):
                layer.load_state_dict({**good, name: value})
            assert same(layer(x), want)  # nothing was taken of it
    with pytest.raises(RuntimeError, match=r"Missing key.*zps"):
        layer.load_state_dict({name: value for name, value in good.items() if name != "zps"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        layer.load_state_dict({**good, "weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        DA8W4Linear(64, 40, bias=False).load_state_dict(good)
    layer.load_state_dict({"codes": good["codes"]}, strict=False)
    assert same(layer(x), want)


@pytest.mark.parametrize("weight", KINDS, ids=str)
def test_state_dict_of_every_kind(weight: Weight, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    layer = DA8W4Linear.from_packed(pack(weight), torch.randn(weight.n))
    assert_same_weight(layer.packed, pack(weight))
    x, other = torch.randn(3, weight.k), DA8W4Linear(weight.k, weight.n)
    want, plain = layer(x), copy.deepcopy(other)
    assert same(want, expected(layer, x)) and not plain(x).any()
    save_file(layer.state_dict(), tmp_path / "s")
    for state in (layer.state_dict(), load_file(tmp_path / "s")):
        for assign in (False, True):
            other.load_state_dict(state, strict=True, assign=assign)
            assert same(other(x), want) and other.state_dict().keys() == state.keys()
            assert_same_weight(other.packed, pack(weight))
            # Back to another kind: the state decides.
            other.load_state_dict(plain.state_dict(), strict=True)
            assert same(other(x), plain(x)) and other.state_dict().keys() == plain.state_dict().keys()
    for moved in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().share_memory()):
        assert same(moved(x), want)
    assert layer.layout.numel() == 4 or f"bits={weight.bits}" in repr(layer)
    meta = DA8W4Linear(weight.k, weight.n, device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert same(meta(x), want)
    meta = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    meta.load_state_dict(layer.state_dict())
    assert same(meta(x), want)


@pytest.mark.parametrize("offsets", [False, True])
def test_state_dict_of_layout_version_1(offsets: bool) -> None:
    weight = Weight(40, 64, 32, offsets=offsets)
    layer = DA8W4Linear.from_packed(pack(weight), torch.randn(40))
    state = {**layer.state_dict(), "layout": torch.tensor([1, 40, 64, 32])}
    for other in (
        DA8W4Linear(64, 40),
        DA8W4Linear.from_packed(pack(Weight(40, 64, bits=6, supers=1)), torch.zeros(40)),
    ):
        other.load_state_dict(state)
        x = torch.randn(3, 64)
        assert same(other(x), layer(x)) and same(torch.compile(other, backend="eager", fullgraph=True)(x), layer(x))
        assert_same_weight(other.packed, layer.packed)


def test_state_dict_of_two_levels_that_does_not_fit() -> None:
    weight = Weight(65, 520, 16, "bfloat16", 0, True, table=True, supers=5, perm=True, factors=True, rotation=64)
    layer = DA8W4Linear.from_packed(pack(weight))
    x = torch.randn(2, 520)
    want, good = layer(x), layer.state_dict()

    def changed(at: int, number: int) -> torch.Tensor:
        layout = good["layout"].clone()
        layout[at] = number
        return layout

    twice, beyond, infinite = good["perm"].clone(), good["perm"].clone(), good["factors"].clone()
    twice[0], beyond[3], infinite[7] = twice[1], 520, float("inf")
    changes: dict[str, Any] = {
        # Layout version, N, K, group size, bits, super-groups, arrays, rotation.
        "layout": [
            *(changed(*one) for one in [(0, 1), (0, 3), (1, 64), (2, 512), (3, 6), (4, 5), (4, 7), (5, 0), (5, -1)]),
            *(changed(6, int(good["layout"][6]) ^ 1 << i) for i in (0, 2, 3, 5, 6, 10)),
            changed(6, -1),
            *(changed(7, value) for value in (1, 3, -2, 2048)),
            good["layout"][:6],
            good["layout"].int(),
            good["layout"][None],
        ],
        "codes": [good["codes"][:, :-1]],
        "scales": [good["scales"][:, :-1], good["scales"].double(), good["scales"].int()],
        "zps": [torch.tensor(1, dtype=torch.int8), torch.zeros(3, 33, 32, dtype=torch.int8)],
        "offsets": [good["offsets"].float()],
        "sub_scales": [good["sub_scales"][1:], good["sub_scales"].short()],
        "sub_offsets": [good["sub_offsets"][1:], good["sub_offsets"].float()],
        "table": [good["table"][:15], good["table"].to(torch.uint8)],
        "perm": [good["perm"][1:], good["perm"].long(), twice, beyond, -good["perm"]],
        "factors": [good["factors"][1:], good["factors"].half(), infinite],
    }
    for name, values in changes.items():
        for value in values:
            with pytest.raises(RuntimeError, match=name):
                layer.load_state_dict({**good, name: value})
            assert same(layer(x), want)  # nothing was taken of it
    for name in good.keys() - {"layout"}:
        other = DA8W4Linear(520, 65, bias=False)
        with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
            other.load_state_dict({key: value for key, value in good.items() if key != name})
        if name not in ("codes", "scales", "sums", "zps"):  # which it had before
            with pytest.raises(ValueError, match=name):
                other(x)
    plain = DA8W4Linear(520, 65, bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*perm"):
        plain.load_state_dict({**plain.state_dict(), "perm": good["perm"]})
    layer.load_state_dict({"sub_scales": good["sub_scales"], "table": good["table"]}, strict=False)
    assert same(layer(x), want)


def test_a_permutation_that_is_changed_in_place() -> None:
    """Kernels read where it tells them to."""
    layer = copy.deepcopy(DA8W4Linear.from_packed(pack(Weight(33, 260, 64, perm=True, factors=True, offsets=True))))
    x = torch.randn(2, 260)
    layer(x)
    for value in (-1, 260, 1 << 30):
        layer.perm[7] = value
        for call in (lambda: layer(x), lambda: torch.vmap(layer)(x), lambda: layer.columns(x, 0, 32)):
            with pytest.raises(ValueError, match="perm must have each of 0 to 259 once"):
                call()


def test_act_may_change() -> None:
    layer = DA8W4Linear.from_packed(pack(Weight(64, 512, 32, "float16", 0, offsets=True, supers=8)))
    x, outs = torch.randn(3, 512), []
    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for act in ACTS:
        layer.act = act
        outs.append(layer(x))
        assert same(outs[-1], expected(layer, x)) and same(function(x), outs[-1])
        assert same(torch.vmap(layer)(x), outs[-1])
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.sharing_weight(None)):
            assert other.act == act and same(other(x), outs[-1])
    assert len({tuple(out.flatten().tolist()) for out in outs}) == len(ACTS)
    with pytest.raises(ValueError, match=r"act must be 'uint8', 'int8', 'int8_group' or 'int16', got 'int4'"):
        layer.act = "int4"
    with pytest.raises(TypeError, match=r"act must be .*int16', got bool"):
        DA8W4Linear(64, 40, act=True)
    assert layer.act == "int16" and "act" not in layer.state_dict()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_module_that_was_pickled_with_symmetric_activation(symmetric: bool) -> None:
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 32)
    state = layer.__getstate__()
    old = {name: value for name, value in state.items() if name not in ("_act", "_scheme")}
    old["_buffers"] = {name: value for name, value in state["_buffers"].items() if value is not None}
    other = DA8W4Linear.__new__(DA8W4Linear)
    other.__setstate__({**old, "symmetric_activation": symmetric})
    layer.act = "int8" if symmetric else "uint8"
    x = torch.randn(2, 64)
    assert other.act == layer.act and same(other(x), layer(x))
    other.load_state_dict(DA8W4Linear.from_packed(pack(Weight(40, 64, 32, bits=5, perm=True)), layer.bias).state_dict())
    assert other(x).isfinite().all()


@pytest.mark.parametrize("group", [65, 68, 128])
def test_a_group_longer_than_k_is_refused(group: int) -> None:
    # Every tensor has the shape of one group; only this number is wrong.
    layer = DA8W4Linear.from_linear(nn.Linear(64, 40), 64)
    layout = layer.layout.clone()
    layout[3] = group
    with pytest.raises(RuntimeError, match="layout"):
        layer.load_state_dict({**layer.state_dict(), "layout": layout})


def test_group_too_large_for_its_zero_points() -> None:
    k = 1 << 18
    layer = DA8W4Linear(k, 1, group_size=k)
    state = layer.state_dict() | {"zps": torch.tensor(-128, dtype=torch.int8)}
    with pytest.raises(RuntimeError, match="too large"):
        layer.load_state_dict(state)


def test_deepcopy_pickle_and_save() -> None:
    model = Attention()
    quantize_(model)
    fuse_linears(model, GROUPS)
    x = torch.randn(2, 64)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert same(other(x), want)
        assert other.k_proj._sharing.whole is other.q_proj.fused
        other.q_proj.fused.codes.zero_()
        assert not same(other(x), want)
    assert same(model(x), want)


def _child(model: nn.Module, x: torch.Tensor, queue: Any) -> None:
    with torch.no_grad():
        queue.put(model(x).numpy())


def test_torch_multiprocessing() -> None:
    import torch.multiprocessing as multiprocessing

    layer = DA8W4Linear.from_linear(nn.Linear(64, 40))
    x = torch.randn(2, 64)
    want = layer(x)
    model = nn.Sequential(layer).share_memory()  # moves the memory under the tensors
    assert layer.codes.is_shared() and layer.scales.is_shared()
    assert same(model(x), want)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(model, x, queue))
    process.start()
    assert (queue.get(timeout=120) == want.numpy()).all()
    process.join()
    assert process.exitcode == 0


def test_a_packed_head_in_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())  # as docs/torch.md says
    quantize_(model, 32)
    prompt = torch.arange(10)[None]
    want, names = model(prompt).logits, model.state_dict().keys()
    with pytest.warns(UserWarning, match="keeps its packed weight"):
        model.tie_weights()
    assert same(model(prompt).logits, want) and model.state_dict().keys() == names
    model.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises((TypeError, ValueError), match=r"head|resized before it is quantized"):
        model.resize_token_embeddings(70)


def test_whole_modules_need_weights_only_false() -> None:
    file = io.BytesIO()
    torch.save(nn.Sequential(DA8W4Linear(64, 40)), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file, weights_only=True)
    file.seek(0)
    assert same(torch.load(file, weights_only=False)[0](torch.ones(1, 64)), torch.zeros(1, 40))
