"""Mixtures of experts: the operator, the module, and models of transformers that have them."""

from __future__ import annotations

import copy
import gc
import pickle
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn
from torch_cases import ACTS, FLOATS, MARKS, same

import pyda8w4
from pyda8w4.torch import DA8W4Experts, DA8W4Linear, quantize_

pytestmark = MARKS

E, K, WIDTH, N = 5, 64, 48, 36  # WIDTH gates, and as many ups

GATINGS = [
    {"activation": "silu"},
    {"activation": "gelu", "interleaved": True},
    {"activation": "gelu_tanh"},
    {"activation": "swigluoai", "interleaved": True, "alpha": 1.5, "limit": 2.0},
]


def stacked(n: int, k: int, seed: int = 0, bits: int = 4) -> pyda8w4.PackedExperts:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (E, n, k), np.int8)
    scales = rng.uniform(0.1, 1, (E, n, -(-k // 16))).astype(np.float32) / (1 << bits)
    zps = rng.integers(-2, 3, scales.shape, np.int8)
    return pyda8w4.stack([pyda8w4.prepack(*one, bits=bits, group_size=16) for one in zip(codes, scales, zps)])


def experts_of(bias: bool = False, **options: Any) -> DA8W4Experts:
    biases = (torch.randn(E, 2 * WIDTH), torch.randn(E, N)) if bias else ()
    return DA8W4Experts.from_packed(stacked(2 * WIDTH, K), stacked(N, WIDTH, 1), *biases, **options)


def routed(*rows: int, slots: int = 3, dtype: Any = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(*rows, K).to(dtype), torch.randint(-1, E, (*rows, slots)), torch.rand(*rows, slots)


def expected(experts: DA8W4Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """By the numpy function; through float32, which holds every half exactly, and one rounding."""
    biases = [None if part.bias is None else part.bias.numpy() for part in (experts.gate_up, experts.down)]
    out = pyda8w4.moe(
        x.float().numpy(),
        experts.gate_up.packed,
        experts.down.packed,
        torch.where(ids == experts.num_experts, -1, ids).numpy(),
        weights.float().numpy(),
        activation=experts.activation,
        interleaved=experts.interleaved,
        alpha=experts.alpha,
        limit=experts.limit,
        gate_up_bias=biases[0],
        down_bias=biases[1],
        act=experts.act,
    )
    return torch.from_numpy(out).to(x.dtype)


@pytest.mark.parametrize("gating", GATINGS, ids=lambda gating: gating["activation"])
@pytest.mark.parametrize("act", ACTS)
def test_bits_of_the_numpy_function(gating: dict[str, Any], act: str) -> None:
    for bias, dtype in zip((False, True, True), FLOATS):
        experts = experts_of(bias, **gating, act=act)
        for rows in ((), (1,), (7,), (2, 3), (0,)):
            operands = routed(*rows, dtype=dtype)
            out = experts(*operands)
            assert out.shape == (*rows, N) and same(out, expected(experts, *operands))


def test_operands_of_other_kinds() -> None:
    experts = experts_of()
    x, ids, weights = routed(6)
    want = experts(x, ids, weights)
    assert same(experts(x, ids.int(), weights), want)
    assert same(experts(x.repeat(1, 2)[:, :K], ids.T.contiguous().T, weights.repeat(1, 2)[:, :3]), want)
    half = weights.bfloat16()
    assert same(experts(x, ids, half), experts(x, ids, half.float()))
    assert same(experts(x, torch.full_like(ids, -1), weights), torch.zeros(6, N))
    # What is given for none, by transformers.
    assert same(experts(x, torch.where(ids == -1, E, ids), weights), want)
    assert same(experts(x, torch.where(ids == -1, E, ids).int(), weights), want)
    assert same(experts(x, ids, torch._neg_view(weights)), experts(x, ids, -weights))
    row = experts(x[2:3], ids[2:3], weights[2:3])
    assert same(row, want[2:3])


def test_rows_that_are_sorted_by_experts() -> None:
    """As Llama 4 gives them, with zeros where a row does not take an expert."""
    experts = experts_of()
    x = torch.randn(E, 4, K)
    x[1, 2] = x[3] = 0
    x[4, 1, 5] = float("nan")
    ids = torch.arange(E)[:, None].expand(E, 4)
    want = expected(experts, x.reshape(-1, K), ids.reshape(-1, 1), torch.ones(E * 4, 1))
    out = experts(x.reshape(-1, K))
    assert out.isnan().any(-1).nonzero().flatten().tolist() == [17]
    assert torch.equal(out.nan_to_num(), want.nan_to_num())
    biased = experts_of(True)
    rows = x.nan_to_num().reshape(-1, K)
    assert same(biased(rows), expected(biased, rows, ids.reshape(-1, 1), torch.ones(E * 4, 1)))
    with pytest.raises(ValueError, match="R a multiple of 5"):
        experts(torch.randn(4, K))
    with pytest.raises(TypeError, match="must both be given"):
        experts(torch.randn(5, K), ids)


@pytest.mark.parametrize("bits", [5, 8])
def test_other_weights(bits: int) -> None:
    experts = DA8W4Experts.from_packed(stacked(2 * WIDTH, K, bits=bits), stacked(N, WIDTH, bits=bits))
    operands = routed(4)
    assert same(experts(*operands), expected(experts, *operands))
    again = DA8W4Experts(E, K, WIDTH, N)
    again.load_state_dict(experts.state_dict())
    assert same(again(*operands), experts(*operands)) and f"bits={bits}" in repr(again)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, K, dtype=torch.float64)}, TypeError, "input must be float32, bfloat16 or float16"),
        ({"x": torch.ones(3, K + 1)}, ValueError, rf"input must have shape \(..., {K}\)"),
        ({"ids": torch.ones(3, 3)}, TypeError, "topk_ids must be int64 or int32, got torch.float32"),
        ({"ids": torch.full((3, 3), E + 1)}, ValueError, f"topk_ids must hold -1 to {E - 1}, got {E + 1}"),
        ({"ids": torch.full((3, 3), -2)}, ValueError, "got -2"),
        ({"ids": torch.full((3, 3), -2, dtype=torch.int32)}, ValueError, "got -2"),
        ({"ids": torch.full((3, 3), 1 << 32)}, ValueError, f"got {1 << 32}"),
        ({"ids": torch.tensor([[E, -2, 0]] * 3)}, ValueError, "got -2"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"topk_ids must have shape \(3, T\)"),
        ({"ids": torch.zeros((), dtype=torch.int64)}, ValueError, r"topk_ids must have shape \(3, T\)"),
        ({"weights": torch.zeros(3, 2)}, ValueError, r"topk_weights must have the shape of topk_ids, \(3, 3\)"),
        ({"weights": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "topk_weights must be float32"),
        ({"ids": [[0, 1, 2]] * 3}, TypeError, "top_k_index must be a tensor, got list"),
        ({"ids": np.zeros((3, 3), np.int64)}, TypeError, "top_k_index must be a tensor, got ndarray"),
        ({"weights": np.ones((3, 3), np.float32)}, TypeError, "top_k_weights must be a tensor, got ndarray"),
        ({"x": torch.ones(3, K, device="meta")}, ValueError, "input must be a dense tensor on the CPU"),
        ({"ids": torch.zeros(3, 3, dtype=torch.int64, device="meta")}, ValueError, "topk_ids must be a dense tensor"),
    ],
)
def test_bad_operands(change: dict[str, Any], error: Any, message: str) -> None:
    experts = experts_of()
    operands = dict(zip(("x", "ids", "weights"), routed(3)))
    with pytest.raises(error, match=message):
        experts(*(operands | change).values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="no nested tensor"):
        experts_of()(torch.nested.nested_tensor([torch.ones(3, K)]), *routed(3)[1:])


def test_bad_arguments() -> None:
    gate_up, down = stacked(2 * WIDTH, K), stacked(N, WIDTH)
    make = DA8W4Experts.from_packed
    with pytest.raises(TypeError, match="down must be PackedExperts, got PackedWeight"):
        make(gate_up, down[0])
    with pytest.raises(ValueError, match=r"must have shapes \(E, 2 I, K\) and \(E, N, I\)"):
        make(gate_up, down[:2])
    with pytest.raises(ValueError, match="must both be given"):
        make(gate_up, down, torch.zeros(E, 2 * WIDTH))
    with pytest.raises(ValueError, match=rf"down_bias must have shape \({E}, {N}\)"):
        make(gate_up, down, torch.zeros(E, 2 * WIDTH), torch.zeros(N))
    with pytest.raises(ValueError, match="activation must be"):
        make(gate_up, down, activation="relu")
    with pytest.raises(ValueError, match="act must be"):
        make(gate_up, down, act="int4")
    with pytest.raises(ValueError, match="num_experts must be an int of at least 1"):
        DA8W4Experts(0, K, WIDTH, N)
    with pytest.raises(ValueError, match="group_size"):
        DA8W4Experts(E, K, WIDTH, N, group_size=6)


# ---- the state -------------------------------------------------------------------------------


def test_state() -> None:
    experts = experts_of(True)
    operands = routed(4)
    want = experts(*operands)
    state = experts.state_dict()
    assert not list(experts.parameters()) and state["gate_up.codes"].shape[0] == E
    for assign in (False, True):
        again = DA8W4Experts(E, K, WIDTH, N, True)
        assert again.load_state_dict(state, strict=True, assign=assign) and same(again(*operands), want)
        assert (again.gate_up.codes.data_ptr() == experts.gate_up.codes.data_ptr()) == assign
    for copied in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert same(copied(*operands), want)
    empty = DA8W4Experts(E, K, WIDTH, N, True, device="meta")
    empty.load_state_dict(state, assign=True)
    assert same(empty(*operands), want)
    for name, other in (("gate_up.codes", state["gate_up.codes"][:2]), ("down.scales", state["down.scales"][:, :1])):
        with pytest.raises(RuntimeError, match=f"{name} must be .* of shape"):
            again.load_state_dict({**state, name: other})
    with pytest.raises(RuntimeError, match=r"Missing key.*down.bias"):
        again.load_state_dict({name: tensor for name, tensor in state.items() if name != "down.bias"})
    with pytest.raises(RuntimeError, match="N = 96"):
        DA8W4Experts(E, K, WIDTH, 32, True).load_state_dict({**state, "gate_up.layout": state["down.layout"]})


def test_weights_that_change() -> None:
    """Kept views follow tensors that are replaced, or given other memory."""
    experts, other = experts_of(), experts_of()
    other.down.scales = other.down.scales * 2
    operands = routed(4)
    want = experts(*operands)
    experts.down.scales.data = other.down.scales.clone()
    assert same(experts(*operands), other(*operands)) and not same(want, other(*operands))
    experts.gate_up.codes = torch.zeros_like(experts.gate_up.codes)
    assert same(experts(*operands), expected(experts, *operands))
    experts.gate_up.codes = experts.gate_up.codes[:2]
    with pytest.raises(ValueError, match="scales must be a contiguous CPU tensor"):
        experts(*operands)


def test_dtype_and_device() -> None:
    experts = experts_of(True)
    operands = routed(4)
    want = experts(*operands)
    experts.to(torch.bfloat16)
    assert experts.gate_up.weight.dtype is torch.bfloat16 and experts.down.bias.dtype is torch.float32
    assert experts.gate_up.weight.shape == (E, 2 * WIDTH, K) and same(experts(*operands), want)
    with pytest.raises(NotImplementedError, match="packed"):
        experts.gate_up.weight + 1
    with pytest.raises(ValueError, match="runs on the CPU only"):
        experts._apply(lambda tensor: _Elsewhere(tensor))
    experts.act = "int16"
    assert same(experts(*operands), expected(experts, *operands)) and "act=int16" in repr(experts)
    assert experts.to("meta").gate_up.codes.is_meta


class _Elsewhere:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.device, self.dtype = torch.device("cuda"), tensor.dtype


# ---- graphs ----------------------------------------------------------------------------------


def test_compile_and_export() -> None:
    experts = experts_of(True, **GATINGS[3])
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 7, 19):
            operands = routed(rows)
            assert same(compiled(*operands), experts(*operands))
    ids = torch.tensor([[E, 0, 1]])
    x, _, weights = routed(1)
    assert same(compiled(x, ids, weights), experts(x, ids, weights))
    rows = torch.export.Dim("rows")
    program = torch.export.export(experts, routed(4), dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
    operands = routed(9)
    assert same(program.module()(*operands), experts(*operands))
    sorted_rows = torch.randn(3 * E, K)
    assert same(torch.compile(experts, fullgraph=True, dynamic=True)(sorted_rows), experts(sorted_rows))


def test_operator_is_registered_well() -> None:
    experts = experts_of(True)
    x, ids, weights = routed(3)
    stacks = []
    for part in (experts.gate_up, experts.down):
        tensors = [part._buffers[name] for name in ("codes", "scales", "sums", "zps")]
        stacks += [tensors, part.bias, part.layout.tolist()]
    arguments = (x, ids, weights, *stacks, "silu", False, 1.0, 1.0, None, 1.0, "uint8")
    torch.library.opcheck(torch.ops.pyda8w4.moe.default, arguments)
    assert same(torch.ops.pyda8w4.moe(*arguments), experts(x, ids, weights))
    scaled = torch.ops.pyda8w4.moe(*arguments[:-2], 2.0, "uint8")
    assert torch.allclose(scaled, 2 * experts(x, ids, weights), rtol=1e-5, atol=1e-5)
    # Experts of which only some are here.
    local = torch.tensor([-1, 2, -1, 0, 4, 1], dtype=torch.int32)
    mapped = torch.ops.pyda8w4.moe(x, ids + 1, *arguments[2:-3], local, *arguments[-2:])
    assert same(mapped, experts(x, local[ids + 1], weights))
    with pytest.raises(ValueError, match="weight must be"):
        torch.ops.pyda8w4.moe(x, ids, weights, stacks[0][:2], *arguments[4:])


def test_what_torch_sees() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    experts = experts_of()
    x, ids, weights = routed(6)
    with FlopCounterMode(display=False) as counter:
        experts(x, ids, weights)
    assert counter.get_total_flops() == 2 * 6 * 3 * (2 * WIDTH * K + N * WIDTH)
    with torch.profiler.profile() as profile:
        experts(x, ids, weights)
    assert any(event.key == "pyda8w4::moe" for event in profile.key_averages())
    with torch.autocast("cpu", torch.bfloat16):
        assert same(experts(x, ids, weights), experts(x.bfloat16(), ids, weights))
    many = torch.vmap(experts)(x.reshape(2, 3, K), ids.reshape(2, 3, 3), weights.reshape(2, 3, 3))
    assert same(many.reshape(6, N), experts(x, ids, weights))
    columns = torch.vmap(experts, in_dims=(1, None, None))(x[:, None].expand(6, 2, K), ids, weights)
    assert same(columns[1], experts(x, ids, weights))


@pytest.mark.parametrize("which", ["input", "weights"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_no_gradients(which: str, is_compiled: bool) -> None:
    experts = experts_of()
    x, ids, weights = routed(3)
    (x if which == "input" else weights).requires_grad_()
    torch._dynamo.reset()
    function = torch.compile(experts, fullgraph=True) if is_compiled else experts
    with torch.enable_grad():
        out = function(x, ids, weights)
        assert out.requires_grad and same(out.detach(), expected(experts, x.detach(), ids, weights.detach()))
        with pytest.raises(NotImplementedError, match="for inference"):
            out.sum().backward()
        with pytest.raises(NotImplementedError, match="for inference"):
            x, weights = x.detach(), weights.detach()
            operand = x if which == "input" else weights
            torch.func.jvp(
                lambda one: experts(*((one, ids, weights) if one.shape == x.shape else (x, ids, one))),
                (operand,),
                (operand,),
            )
        with pytest.raises(NotImplementedError, match="for inference"):
            torch.func.grad(lambda x, weights: experts(x, ids, weights).sum(), argnums=which == "weights")(x, weights)


# ---- models ----------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPARSE = {"moe_intermediate_size": 96, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "topk_group": 1,
}  # fmt: skip
# By name: the class without its end, what its config has beside the sizes, and how many mixtures it has.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}, 2),
    "mixtral with gelu": ("Mixtral", {"num_local_experts": 4, "hidden_act": "gelu"}, 2),
    "mixtral with gelu_tanh": ("Mixtral", {"num_local_experts": 4, "hidden_act": "gelu_pytorch_tanh"}, 2),
    "qwen2_moe": ("Qwen2Moe", {**SPARSE, "num_experts": 4, "shared_expert_intermediate_size": 96}, 2),
    "qwen3_moe": ("Qwen3Moe", {**SPARSE, "num_experts": 4, "head_dim": 16}, 2),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, 2),
    "deepseek_v2": ("DeepseekV2", {**SPARSE, **LATENT, "n_group": 1}, 1),
    "deepseek_v3": ("DeepseekV3", {**SPARSE, **LATENT, "n_group": 2}, 1),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, 2),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}, 2),
    "llama4": ("Llama4", {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 96}, 2),
    "jamba": (
        "Jamba",
        {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
        1,
    ),
    "phimoe": ("Phimoe", {"num_local_experts": 4}, 2),
    "glm4_moe": ("Glm4Moe", {**SPARSE, "n_routed_experts": 4, "head_dim": 16, "first_k_dense_replace": 1}, 1),
    "minimax": ("MiniMax", {"num_local_experts": 4, "head_dim": 16}, 2),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "head_dim": 16}, 2),
}
PROMPT = torch.arange(12)[None] % 9 + 5


@pytest.fixture
def hf() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import pyda8w4.torch.transformers

    transformers.C = pyda8w4.torch.transformers.DA8W4Config
    return transformers


def model_of(hf: Any, name: str) -> Any:
    kind, options, _ = MODELS[name]
    config = getattr(hf, "Llama4TextConfig" if kind == "Llama4" else f"{kind}Config")(**{**SIZES, **options})
    model = getattr(hf, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # as large as those of trained models, biases too
        if parameter.dim() > 1 and not parameter.is_sparse:
            nn.init.normal_(parameter, std=0.1)
    return model


def mixtures(model: nn.Module) -> dict[str, DA8W4Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DA8W4Experts)}


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_models(name: str, hf: Any) -> None:
    """Beside the float module with the weights that ours stand for, which transformers runs."""
    model = model_of(hf, name)
    floats = copy.deepcopy(model)
    report = quantize_(model, 32)
    found = mixtures(model)
    assert len(found) == MODELS[name][2] and found.keys() <= {*report.replaced}
    for path, experts in found.items():
        module = floats.get_submodule(path)
        transposed = name in ("gpt_oss", "llama4")
        for part, parameter in ((experts.gate_up, module.gate_up_proj), (experts.down, module.down_proj)):
            weights = torch.from_numpy(np.stack([weight.dequantize() for weight in part.packed]))
            weights = weights.mT if transposed else weights
            assert error(weights, parameter) < 0.12  # that of 4 bits
            parameter.copy_(weights)
        x = torch.randn(10, 64)
        ids, weights = torch.randint(0, 4, (10, 2)), torch.rand(10, 2)
        ids[:, 1] = (ids[:, 0] + 1) % 4
        operands = (x.repeat(2, 1),) if name == "llama4" else (x, ids, weights)
        want = module(*operands)
        # Of the activations: those of 16 bits are as good as floats, those of 8 bits err by about 0.4 % each.
        for act, bound in (("int16", 2e-4), ("uint8", 0.02)):
            experts.act = act
            out = experts(*operands)
            assert error(out, want) < bound
            if name != "llama4":
                assert same(out, expected(experts, *operands))


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, hf: Any, tmp_path: Any) -> None:
    """A whole model: quantized, and as it is loaded, saved, and loaded again."""
    model = model_of(hf, name)
    model.save_pretrained(tmp_path / "float")
    cls = type(model)
    packed = cls.from_pretrained(
        tmp_path / "float", quantization_config=hf.C(32, act="int16", modules_to_not_convert=[])
    )
    quantize_(model, 32, act="int16")
    assert mixtures(packed).keys() == mixtures(model).keys() != set()
    want = packed(PROMPT, use_cache=False).logits
    assert error(model(PROMPT, use_cache=False).logits, want) < 1e-5
    packed.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed")
    for path, experts in mixtures(packed).items():
        ours, theirs = experts.state_dict(), again.get_submodule(path).state_dict()
        assert ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
        assert again.get_submodule(path)._gating == experts._gating and again.get_submodule(path).act == "int16"
    assert error(again(PROMPT, use_cache=False).logits, want) < 1e-5
    again.save_pretrained(tmp_path / "twice")
    twice = cls.from_pretrained(tmp_path / "twice")
    assert error(twice(PROMPT, use_cache=False).logits, want) < 1e-5


def test_generates(hf: Any) -> None:
    model = model_of(hf, "qwen3_moe")
    quantize_(model, 32)
    options = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    tokens = model.generate(PROMPT, **options)
    assert tokens.shape == (1, 18)
    for i in range(12, 18):
        assert int(model(tokens[:, :i]).logits[0, -1].argmax()) == int(tokens[0, i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype: Any, hf: Any, tmp_path: Any) -> None:
    model = model_of(hf, "gpt_oss").to(dtype)
    model.save_pretrained(tmp_path / "float")
    load = type(model).from_pretrained
    quantize_(model, 32)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up.weight.dtype is dtype and experts.gate_up.bias.dtype is torch.float32
    loaded = load(tmp_path / "float", dtype=dtype, quantization_config=hf.C(32, modules_to_not_convert=[]))
    x, ids, weights = torch.randn(5, 64).to(dtype), torch.randint(0, 4, (5, 2)), torch.rand(5, 2).to(dtype)
    out = loaded.model.layers[0].mlp.experts(x, ids, weights)
    assert out.dtype is dtype and same(out, experts(x, ids, weights)) and same(out, expected(experts, x, ids, weights))


def test_compiled_model(hf: Any) -> None:
    model = model_of(hf, "qwen3_moe")
    quantize_(model, 32)
    want = model(PROMPT, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, dynamic=True)
    x = torch.randn(1, 7, 64)
    assert torch.allclose(compiled(x), model.model.layers[0].mlp(x), rtol=1e-4, atol=1e-5)
    assert same(model(PROMPT, use_cache=False).logits, want)


def silu_up_to_100(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate.clamp(max=100)) * up


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module: setattr(module, "act_fn", nn.ReLU()), "its gate with ReLU is none of silu, gelu"),
        (lambda module: setattr(module, "_apply_gate", lambda x: x.chunk(2, -1)[0]), "its gate with SiLU"),
        (lambda module: setattr(module, "_apply_gate", silu_up_to_100), "its gate with SiLU"),
        (lambda module: setattr(module, "act_fn", None), "its gate raises TypeError"),
        (lambda module: setattr(module, "has_gate", False), "it has no gate"),
        (lambda module: setattr(module, "has_post_expert_norm", True), "its experts have norms"),
        (lambda module: module.register_forward_hook(lambda *_: None), "it has hooks"),
        (lambda module: module.register_buffer("more", torch.ones(1)), "it must have down_proj, gate_up_proj, got"),
        (lambda module: module.down_proj[1, 0, 0].fill_(float("nan")), "down_proj must be finite"),
        (lambda module: setattr(module, "down_proj", nn.Parameter(torch.ones(4, 64, 32))), "its parameters must be"),
    ],
)
def test_experts_that_are_kept(change: Any, reason: str, hf: Any) -> None:
    model = model_of(hf, "mixtral")
    module = model.model.layers[0].mlp.experts
    change(module)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    with pytest.warns(UserWarning, match=f"MixtralExperts stays float: {reason}"):
        report = quantize_(model, 32)
    assert model.model.layers[0].mlp.experts is module
    assert len(mixtures(model)) == 1 and list(report.kept) == ["model.layers.0.mlp.experts"]
    size = sum(parameter.nbytes for parameter in module.parameters())
    assert report.float_bytes["model.layers.0.mlp.experts"] == size and 0.3 < report.float_share < 0.6
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_experts_that_say_nothing_of_norms(hf: Any) -> None:
    """As before transformers 5.20, which vLLM needs."""
    model = model_of(hf, "mixtral")
    for layer in model.model.layers:
        vars(layer.mlp.experts).pop("has_post_expert_norm", None)
    quantize_(model, 32)
    assert len(mixtures(model)) == 2


def test_filter_and_routers(hf: Any) -> None:
    model = model_of(hf, "hunyuan_v1_moe")
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantize_(model, 32, filter_fn=lambda module, name: seen.append(name) or "layers.0" not in name)
    assert report.kept["model.layers.0.mlp.experts"] == "filter_fn"
    assert report.kept["model.layers.1.mlp.gate.wg"] == "it chooses experts" not in seen
    assert "Linear layers and mixtures of experts" in str(report) and len(mixtures(model)) == 1
    with pytest.raises(ValueError, match="must hold its Linear layers"):
        quantize_(model.model.layers[0].mlp.experts)


def test_experts_that_are_one_module(hf: Any) -> None:
    model = model_of(hf, "mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    quantize_(model, 32)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert first is second and isinstance(first, DA8W4Experts)


def test_lists_of_experts_are_linears(hf: Any) -> None:
    config = hf.SwitchTransformersConfig(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, num_experts=4, decoder_start_token_id=0
    )
    model = hf.SwitchTransformersForConditionalGeneration(config).eval()
    report = quantize_(model, 32)
    assert sum(".experts." in name for name in report.replaced) > 8 and not mixtures(model)
    assert model(input_ids=PROMPT, decoder_input_ids=PROMPT).logits.isfinite().all()


def test_memory_while_quantizing(hf: Any) -> None:
    """One expert at a time, into the memory of the result; the first parameter is let go of before the second."""
    config = hf.MixtralConfig(**{**SIZES, "hidden_size": 256, "num_local_experts": 32, "intermediate_size": 512})
    with torch.device("meta"):
        model = hf.MixtralForCausalLM(config)
    module = model.model.layers[0].mlp.experts
    assert module.config is not None
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(torch.randn(getattr(module, name).shape), requires_grad=False))
    one = module.gate_up_proj[0].nbytes
    alive = []
    holder = nn.Sequential(nn.Sequential(module))
    parameters = [module.gate_up_proj, module.down_proj]
    for parameter in parameters:
        import weakref

        weakref.finalize(parameter, alive.append, 1)
    del parameter, parameters, module
    model.model.layers[0].mlp.experts = nn.Identity()
    from pyda8w4.torch import _experts

    at_stack = []
    stack = _experts.stack
    try:
        _experts.stack = lambda weights: (gc.collect(), at_stack.append(len(alive)), stack(weights))[-1]
        tracemalloc.start()
        quantize_(holder, 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        _experts.stack = stack
    assert at_stack == [0, 1] and len(alive) == 2
    result = sum(buffer.nbytes for buffer in holder.buffers())
    assert peak < result + 4 * one  # quantized in float32, from codes of a byte


def test_damaged_checkpoints(hf: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = model_of(hf, "mixtral")
    quantize_(model, 32)
    model.save_pretrained(tmp_path)
    load = type(model).from_pretrained
    with pytest.raises(ValueError, match=r"experts.down is \(4, 64, 64\) by the config of the model, \(4, 64, 96\)"):
        load(tmp_path, intermediate_size=64)
    tensors = load_file(tmp_path / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if ".experts.down." not in name}
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="must have gate_up and down, got only gate_up"):
        load(tmp_path)
    name = next(name for name in tensors if ".experts.gate_up.codes" in name)
    tensors[name.replace("codes", "bias")] = torch.zeros(4, 192)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="gate_up must have no bias by the config"):
        load(tmp_path)


def test_layers_beside_experts_are_linear(hf: Any) -> None:
    model = model_of(hf, "qwen2_moe")
    quantize_(model, 32)
    assert isinstance(model.model.layers[0].mlp.shared_expert.gate_proj, DA8W4Linear)
