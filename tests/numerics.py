"""The one tolerance rule of the operator's tests, and the inputs they share.

Against the definition in float64, the error of an implementation is at most twice (gradients: three times) the error
of the same maths done eagerly in the same dtype. It is never asked to be below half a unit of rounding of that dtype,
nor below two units of float32, in which all sums are made: their order, which no two implementations share, moves a
sum over a head's width by as much.

The gradient of a decay a head is a handful of numbers, whose error may be small or large by luck. What counts as
eager's is what the errors of its terms make on average, as if they were independent (:func:`expected_error`).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnl.ops import lightning_attention, lightning_attention_step, lightning_torch


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; ``decay`` is "none", "head" or "token"."""

    B: int = 2
    T: int = 65
    Hq: int = 2
    H: int = 2
    D: int = 16
    E: int = 16
    decay: str = "head"
    bounds: tuple[int, ...] | None = None
    scale: float = 0.7

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Random arguments by name, and the gradients ``do`` and ``dfinal_state`` to pull back."""
        g = torch.Generator().manual_seed(seed)
        state_dtype = torch.promote_types(dtype, torch.float32)
        sequences = self.B if self.bounds is None else len(self.bounds) - 1

        def random(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=g).to(to).to(device)

        log_decay = None
        if self.decay != "none":
            shape = (self.Hq,) if self.decay == "head" else (self.B, self.T, self.Hq)
            log_decay = (-torch.rand(*shape, generator=g).square() * 0.5).to(state_dtype).to(device)
        state = (sequences, self.Hq, self.D, self.E)
        return {
            "q": random(self.B, self.T, self.Hq, self.D),
            "k": random(self.B, self.T, self.H, self.D),
            "v": random(self.B, self.T, self.H, self.E),
            "log_decay": log_decay,
            "initial_state": random(*state, to=state_dtype),
            "cu_seqlens": None if self.bounds is None else torch.tensor(self.bounds, device=device),
            "do": random(self.B, self.T, self.Hq, self.E),
            "dfinal_state": random(*state, to=state_dtype),
        }


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Masked attention with states, every product in the dtype of ``q``, as a reader would write it in a line each."""
    tokens, heads = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    decay = torch.zeros(heads, device=q.device) if log_decay is None else log_decay
    decay = decay.expand(q.shape[0], tokens, heads)
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        qs, ks, vs = (x[:, begin:end].transpose(1, 2) for x in (q, k, v))
        state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        total = decay[:, begin:end].transpose(1, 2).cumsum(-1)
        gap = total[..., :, None] - total[..., None, :]
        causal = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).tril()
        mask = gap.masked_fill(~causal, -torch.inf).exp().to(q.dtype)
        before = total.exp()[..., None].to(q.dtype)
        o = scale * ((qs @ ks.mT * mask) @ vs + before * (qs @ state.to(q.dtype)))
        outputs.append(o.transpose(1, 2))
        if end == begin:
            finals.append(state)
            continue
        after = (total[..., -1:] - total).exp()[..., None].to(q.dtype)
        finals.append(total[..., -1:, None].exp() * state + (ks * after).mT @ vs)
    return torch.cat(outputs, dim=1), torch.cat(finals).to(initial_state.dtype)


class Results(dict[str, Tensor]):
    """Outputs and gradients by name; ``terms``: what the decay's gradient adds up (:func:`decay_terms`), if known."""

    terms: tuple[Tensor, Tensor] | None = None


def decay_terms(gradients: dict[str, Tensor], arguments: dict[str, Any], final_state: Tensor) -> tuple[Tensor, Tensor]:
    """``q . dq - k . dk`` ``[B, T, Hq]`` and ``<S_T, dS_T>`` ``[N, Hq]`` in float64; keys for every query head.

    A difference of larger terms: what their rounding leaves of it is not an implementation's to answer for.
    """
    difference = (arguments["q"].double() * gradients["dq"].double()).sum(-1)
    difference -= (arguments["k"].double() * gradients["dk"].double()).sum(-1)
    return difference, (final_state.double() * arguments["dfinal_state"].double()).sum((-1, -2))


def decay_gradient(case: Case, difference: Tensor, final: Tensor) -> Tensor:
    """Gradient of the log decay by the implementation's maths: of every token the sum of the terms from there on."""
    bounds = [0, case.T] if case.bounds is None else list(case.bounds)
    sums = torch.zeros_like(difference)
    for n, (begin, end) in enumerate(pairwise(bounds)):
        rest = difference[:, begin:end].flip(1).cumsum(1).flip(1)
        sums[:, begin:end] = rest + (final if case.bounds is None else final[n : n + 1])[:, None]
    return sums.sum((0, 1)) if case.decay == "head" else sums


def results(case: Case, which: str, inputs: dict[str, Any]) -> Results:
    """Outputs and gradients by name; ``which`` is a backend, "eager", or "reference" (float64 recurrence)."""
    if which in ("eager", "reference"):  # keys and values for every query head, as the decay's terms need them
        inputs = inputs | {name: inputs[name].repeat_interleave(case.Hq // case.H, dim=2) for name in ("k", "v")}
    if which == "reference":
        inputs = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in inputs.items()}
        inputs = {n: None if x is None else x.cpu() for n, x in inputs.items()}
    arguments = {name: x for name, x in inputs.items() if name not in ("do", "dfinal_state") and x is not None}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in arguments.items() if x.is_floating_point()}
    full: dict[str, Any] = {"log_decay": None, "cu_seqlens": None} | arguments | leaves
    if which == "reference":
        o, final_state = lightning_torch.recurrence(**full, scale=case.scale)
    elif which == "eager":
        o, final_state = eager(**full, scale=case.scale)
    else:
        o, final = lightning_attention(**full, scale=case.scale, return_final_state=True, backend=which)
        assert final is not None
        final_state = final
    pulled = torch.autograd.grad((o, final_state), list(leaves.values()), (inputs["do"], inputs["dfinal_state"]))
    gradients = {f"d{name}": x for name, x in zip(leaves, pulled, strict=True)}
    terms = None
    if which in ("eager", "reference"):
        if case.decay != "none":
            terms = decay_terms(gradients, inputs, final_state)
        if which == "eager" and terms is not None:
            gradients["dlog_decay"] = decay_gradient(case, *terms)
        for name in ("dk", "dv"):
            gradients[name] = gradients[name].unflatten(2, (case.H, -1)).sum(3)
    found = Results({"o": o, "final_state": final_state} | gradients)
    found.terms = terms
    return found


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """``|actual - reference| / |reference|`` in the Euclidean norm, in float64."""
    reference = reference.double().cpu()
    difference = (actual.double().cpu() - reference).norm()
    return (difference / reference.norm().clamp(min=1e-300)).item()


def assert_as_good_as_eager(
    actual: dict[str, Tensor],
    eager_result: dict[str, Tensor],
    reference: dict[str, Tensor],
    dtype: torch.dtype,
    case: Case | None = None,
) -> None:
    """The tolerance rule of this module, for every output and gradient; with the case where the decay's is one."""
    assert set(actual) == set(reference)
    for name, value in actual.items():
        assert value.isfinite().all(), f"{name} has values that are not finite"
        error = relative_error(value, reference[name])
        rounding = max(torch.finfo(dtype).eps / 2, 2 * torch.finfo(torch.float32).eps)
        if name == "dlog_decay" and case is not None and case.decay == "head":
            allowed = max(expected_error(case, eager_result, reference), rounding)
        else:
            allowed = max(relative_error(eager_result[name], reference[name]), rounding)
        factor = 3 if name.startswith("d") else 2
        assert error <= factor * allowed, f"{name}: error {error:.2e}, eager {allowed:.2e}, factor {factor}"


def expected_error(case: Case, eager_result: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Relative error of eager's gradient of a decay a head that the errors of its terms make on average.

    The gradient is linear in its terms, and each counts once for every token of its sequence up to its own. In a sum of
    independent errors the variances add up, so the weights are squared.
    """
    assert isinstance(eager_result, Results)
    assert isinstance(reference, Results)
    assert eager_result.terms is not None
    assert reference.terms is not None
    difference, final = ((a.cpu() - b).square() for a, b in zip(eager_result.terms, reference.terms, strict=True))
    lengths = torch.tensor([0, case.T] if case.bounds is None else case.bounds).diff()
    counts = torch.cat([torch.arange(1, n + 1) for n in lengths.tolist()])
    variance = (difference * counts.square()[:, None]).sum() + (final * lengths.square()[:, None]).sum()
    return (variance.sqrt() / reference["dlog_decay"].norm().clamp(min=1e-300)).item()


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
    """Run a case by a backend and hold it against the rule."""
    inputs = case.inputs(dtype, device, seed)
    actual = results(case, backend, inputs)
    assert_as_good_as_eager(actual, results(case, "eager", inputs), results(case, "reference", inputs), dtype, case)


SLOPES = (0.9, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)  # from the strongest head of a large TNL to its last layer


def errors_along(
    tokens: int, width: int, dtype: torch.dtype, backend: str, device: str = "cpu", slopes: tuple[float, ...] = SLOPES
) -> Tensor:
    """Relative error of the output in each eighth of a long sequence, ``[len(slopes), 8]``.

    Against the chunked form in float64, which is the recurrence (test_lightning_torch.py).
    """
    g = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, len(slopes), width)
    q, k, v = (torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(dtype) for _ in range(3))
    decay = -torch.tensor(slopes, dtype=torch.float64, device=device)
    o, _ = lightning_attention(q, k, v, decay.float(), backend=backend)
    expected, _ = lightning_torch.forward(q.double(), k.double(), v.double(), decay.float().double(), None, None, 1.0)
    windows = zip(o.chunk(8, dim=1), expected.chunk(8, dim=1), strict=True)
    errors = [[relative_error(x[:, :, h], y[:, :, h]) for h in range(len(slopes))] for x, y in windows]
    return torch.tensor(errors).T


@st.composite
def cases(draw: st.DrawFn, longest: int = 40, widest: int = 20, packing: bool = True) -> Case:
    """Any sizes, decay and packing (with empty sequences); at least two tokens where there is none."""
    T, H, group = draw(st.integers(1 if packing else 2, longest)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    bounds = None
    if packing and draw(st.booleans()):
        bounds = (0, *sorted(draw(st.lists(st.integers(0, T), max_size=3))), T)
    return Case(
        B=draw(st.integers(1, 2)) if bounds is None else 1, T=T, Hq=H * group, H=H, D=draw(st.integers(1, widest)),
        E=draw(st.integers(1, widest)), decay=draw(st.sampled_from(["none", "head", "token"])), bounds=bounds,
    )  # fmt: skip


def lying_apart(x: Tensor, gap: int, heads_first: bool) -> Tensor:
    """The same values at other strides: heads before tokens, rows in a wider buffer, the first at an odd address."""
    x = x.transpose(1, 2) if heads_first else x
    base = torch.full((*x.shape[:-1], x.shape[-1] + gap), torch.nan, dtype=x.dtype)
    base[..., gap:] = x
    base = base[..., gap:]
    return base.transpose(1, 2) if heads_first else base


def prefill_and_decode(
    case: Case, inputs: dict[str, Any], cut: int, layout: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and last state of an unpacked case by a prefill of ``cut`` tokens and one step of the others.

    The step works in a pool, its rows in reverse order.
    """
    q, k, v, decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    parts = (slice(0, cut), slice(cut, case.T))
    first, second = (decay if case.decay != "token" else decay[:, part] for part in parts)
    state = inputs["initial_state"] if layout == "DE" else inputs["initial_state"].mT.contiguous()
    options: dict[str, Any] = {"scale": case.scale, "state_layout": layout, "backend": backend}
    q1, k1, v1 = (x[:, parts[0]] for x in (q, k, v))
    o, state = lightning_attention(q1, k1, v1, first, initial_state=state, return_final_state=True, **options)
    assert state is not None
    pool = torch.full((case.B + 1, *state.shape[1:]), torch.nan, dtype=state.dtype)
    rows = torch.arange(case.B, 0, -1)
    pool[rows] = state
    q2, k2, v2 = (x[:, parts[1]] for x in (q, k, v))
    rest = lightning_attention_step(q2, k2, v2, second, pool, state_indices=rows, **options)
    final = pool[rows]
    return torch.cat([o, rest], dim=1), final if layout == "DE" else final.mT
