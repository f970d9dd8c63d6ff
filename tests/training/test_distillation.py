"""Losses between teacher and student are those of the papers' formulas, written out, and so are their gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import isogrid as ig
from isogrid.errors import DistillationError, NonFiniteError
from isogrid.training import TopK, confidence, divergences, feature_loss, kl_divergence, relation_loss


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def written_out(student: Tensor, teacher: Tensor, temperature: float, reverse: float, mask: Tensor) -> Tensor:
    """The formula in float64, with autograd's gradient."""
    q = torch.softmax(student.double() / temperature, -1)
    p = torch.softmax(teacher.double() / temperature, -1)
    forward, back = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    rows = temperature**2 * ((1 - reverse) * forward + reverse * back)
    return rows[mask].mean()


@settings(max_examples=30)
@given(
    st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 9), st.sampled_from([4, 1 << 20])
)
def test_the_divergence_and_its_gradient_are_the_formula(
    temperature: float, reverse: float, seed: int, chunk: int
) -> None:
    student, teacher = drawn(3, 5, 7, seed=seed).requires_grad_(), drawn(3, 5, 7, seed=seed + 100)
    mask = drawn(3, 5, seed=seed) > -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergences, "CHUNK", chunk)
        loss = kl_divergence(student, teacher, temperature=temperature, reverse=reverse, mask=mask)
    expected = written_out(student, teacher, temperature, reverse, mask)
    # float32 against float64: sums of 7 products of numbers below 100, in units of 2**-24.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (found,), (right,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert (found[~mask] == 0).all()


def test_the_teachers_memory_may_hold_the_gradient() -> None:
    student, teacher = drawn(4, 9).requires_grad_(), drawn(4, 9, seed=1)
    expected = torch.autograd.grad(kl_divergence(student, teacher), student)[0]
    loss = kl_divergence(student, teacher, overwrite_teacher=True)
    (found,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(found, expected) and found.data_ptr() == teacher.data_ptr()
    with pytest.raises(DistillationError, match="goes backward once"):
        loss.backward()


def test_forward_divergence_is_cross_entropy_with_the_teachers_distribution_less_its_entropy() -> None:
    student, teacher = drawn(4, 9), drawn(4, 9, seed=1)
    p = teacher.softmax(-1)
    expected = F.cross_entropy(student, p) + (p * p.log()).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(student, teacher), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        kl_divergence(student, teacher, temperature=2.0),
        4 * F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean"),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_the_top_of_all_classes_gives_the_divergence_of_all_classes() -> None:
    student, teacher = drawn(6, 11).requires_grad_(), drawn(6, 11, seed=1)
    for reverse in (0.0, 0.4):
        whole = kl_divergence(student, teacher, reverse=reverse)
        top = kl_divergence(student, TopK.of(teacher, 11), reverse=reverse)
        assert torch.equal(whole, top)
        assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in (whole, top)))


@pytest.mark.parametrize("reverse", [0.0, 0.5])
def test_the_top_classes_and_the_rest_are_the_formula_over_k_plus_one_classes(reverse: float) -> None:
    student, teacher = drawn(6, 11).requires_grad_(), drawn(6, 11, seed=1)
    top = TopK.of(teacher, 3)
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    chosen = p.topk(3, -1).indices
    assert torch.equal(chosen, top.classes)
    q, p = (torch.cat([x.gather(-1, chosen), 1 - x.gather(-1, chosen).sum(-1, keepdim=True)], -1) for x in (q, p))
    forward, back = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    expected = ((1 - reverse) * forward + reverse * back).mean()
    loss = kl_divergence(student, top, reverse=reverse)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (found,), (right,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert kl_divergence(student, top) <= kl_divergence(student, teacher)


def test_classes_that_a_teacher_forbids_count_for_nothing() -> None:
    student, teacher = drawn(2, 4).requires_grad_(), drawn(2, 4, seed=1)
    teacher[:, 3] = -torch.inf
    p, q = teacher.softmax(-1)[:, :3], student.softmax(-1)[:, :3]
    torch.testing.assert_close(kl_divergence(student, teacher), (p * (p / q).log()).sum(-1).mean())
    (gradient,) = torch.autograd.grad(kl_divergence(student, TopK.of(teacher, 2)), student)
    assert gradient.isfinite().all()


def test_logits_in_bfloat16_have_gradients_in_bfloat16_and_a_loss_in_float32() -> None:
    student, teacher = drawn(4, 9).bfloat16().requires_grad_(), drawn(4, 9, seed=1).bfloat16()
    loss = kl_divergence(student, teacher)
    loss.backward()
    whole = student.detach().float().requires_grad_()
    expected = kl_divergence(whole, teacher.float())
    expected.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert torch.equal(student.grad, whole.grad.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_whose_logits_are_no_numbers_is_refused_where_it_counts(bad: float) -> None:
    student, teacher = drawn(3, 5).requires_grad_(), drawn(3, 5, seed=1)
    teacher[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"teacher's logits hold NaN or infinity\. Look at the batch"):
        kl_divergence(student, teacher)
    with pytest.raises(NonFiniteError, match="teacher's logits"):
        TopK.of(teacher, 2)
    kept = torch.tensor([True, False, True])
    loss = kl_divergence(student, teacher, mask=kept)
    assert torch.equal(loss, kl_divergence(student[kept], teacher[kept]))
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(DistillationError, match="teacher has 6 classes and the student 5: another vocabulary"):
        kl_divergence(drawn(3, 5), drawn(3, 6))
    with pytest.raises(DistillationError, match="Run both on the same batch"):
        kl_divergence(drawn(3, 5), drawn(2, 5))
    with pytest.raises(DistillationError, match=r"computed at temperature 2, and the loss has 1\."):
        kl_divergence(drawn(3, 5), TopK.of(drawn(3, 5), 2, temperature=2.0))
    with pytest.raises(DistillationError, match="mask has shape"):
        kl_divergence(drawn(3, 5), drawn(3, 5), mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(DistillationError, match="shares, from 0 to 1"):
        ig.Distillation(task=1.5)
    with pytest.raises(DistillationError, match="temperature of 0"):
        ig.Distillation(temperature=0)
    with pytest.raises(DistillationError, match="needs targets"):
        ig.Distillation(task=0.5)(drawn(3, 5), drawn(3, 5))


def test_a_task_has_its_share_and_ignored_positions_have_none() -> None:
    student, teacher = drawn(2, 3, 5), drawn(2, 3, 5, seed=1)
    targets = torch.tensor([[1, -100, 2], [-100, 0, 4]])
    kept = targets != -100
    divergence, task = kl_divergence(student[kept], teacher[kept]), F.cross_entropy(student[kept], targets[kept])
    torch.testing.assert_close(ig.Distillation()(student, teacher, targets), divergence)
    mixed = ig.Distillation(task=0.25)(student, (teacher,), targets)
    torch.testing.assert_close(mixed, 0.75 * divergence + 0.25 * task)
    torch.testing.assert_close(ig.Distillation(task=1.0)(student, teacher, targets), task)
    nothing = ig.Distillation()(student, teacher, torch.full((2, 3), -100))
    assert nothing == 0


def test_images_are_distilled_by_the_same_loss() -> None:
    student, teacher, targets = drawn(4, 10), drawn(4, 10, seed=1), torch.tensor([1, 2, 3, 4])
    found = ig.Distillation(temperature=4.0, task=0.1)(student, teacher, targets)
    soft = 16 * F.kl_div(F.log_softmax(student / 4, -1), F.softmax(teacher / 4, -1), reduction="batchmean")
    torch.testing.assert_close(found, 0.9 * soft + 0.1 * F.cross_entropy(student, targets))


def test_confidence_is_the_mean_probability_of_the_right_classes() -> None:
    logits, targets = drawn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, 0, 4]])
    p = logits.double().softmax(-1)
    expected = torch.stack([p[0, 0, 1], p[0, 2, 2], p[1, 1, 0], p[1, 2, 4]]).mean()
    assert confidence(logits, targets) == pytest.approx(float(expected), rel=1e-6)


def test_features_are_compared_relative_to_their_size() -> None:
    student, teacher = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1)
    loss = feature_loss(student, teacher)
    power = teacher.square().mean()
    torch.testing.assert_close(loss, F.mse_loss(student, teacher) / power)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student)[0], 2 * (student - teacher).detach() / (student.numel() * power)
    )
    with pytest.raises(DistillationError, match="Compare layers of one shape"):
        feature_loss(student, teacher[:1])


def test_relations_are_minilm_s_formula() -> None:
    student, teacher = drawn(2, 4, 6), drawn(2, 4, 6, seed=1)
    expected = torch.zeros((), dtype=torch.float64)
    for sequence in range(2):
        for head in range(3):
            s, t = (x[sequence, :, 2 * head : 2 * head + 2].double() for x in (student, teacher))
            q, p = ((x @ x.T / 2**0.5).softmax(-1) for x in (s, t))
            expected += (p * (p / q).log()).sum() / (2 * 3 * 4)
    torch.testing.assert_close(relation_loss(student, teacher, heads=3).double(), expected, rtol=1e-5, atol=1e-6)
    assert relation_loss(student, drawn(2, 4, 9, seed=2), heads=3) > 0  # a teacher may be wider
    with pytest.raises(DistillationError, match="4 heads do not divide 6 features"):
        relation_loss(student, teacher, heads=4)


def test_qkd_gives_each_stage_its_loss_and_the_teacher_gradients_in_co_study_alone() -> None:
    phases = ig.ThreePhases(10, self_study=0.2, co_study=0.4, temperature=2.0)
    assert [phases.stage(step)[0] for step in range(10)] == [*"ss", *"cccc", *"tttt"]
    targets = torch.tensor([1, 2, -100])
    student, teacher = drawn(3, 5).requires_grad_(), drawn(3, 5, seed=1).requires_grad_()

    def gradients(loss: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, [student, teacher], allow_unused=True))

    kept = targets != -100


    def task(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[kept], targets[kept])

    def pull(logits: Tensor, target: Tensor) -> Tensor:
        pair = (logits[kept] / 2).log_softmax(-1), (target[kept] / 2).softmax(-1).detach()
        return 4 * F.kl_div(*pair, reduction="batchmean")

    both = task(student) + pull(student, teacher) + task(teacher) + pull(teacher, student)
    for step, expected in ((0, task(student)), (2, both), (9, task(student) + pull(student, teacher))):
        loss = phases.loss(step, student, teacher, targets)
        torch.testing.assert_close(loss, expected)
        for found, right in zip(gradients(loss), gradients(expected), strict=True):
            assert (found is None) == (right is None)
            if found is not None:
                torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    with pytest.raises(DistillationError, match="together at most 1"):
        ig.ThreePhases(10, self_study=0.6, co_study=0.6)
