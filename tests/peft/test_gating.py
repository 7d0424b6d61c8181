import torch

from convlora.peft.gating import NoisyTopKGate, cv_squared, prob_in_top_k


def test_balance_loss_is_least_when_experts_share_evenly() -> None:
    even, skewed = torch.full((4,), 2.0), torch.tensor([8.0, 0.0, 0.0, 0.0])
    assert cv_squared(even) == 0
    torch.testing.assert_close(cv_squared(skewed), torch.tensor(4.0))  # var 16 / mean 2^2
    assert cv_squared(torch.tensor([3.0])) == 0


def test_probability_of_staying_chosen_equals_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, std = torch.tensor([[0.3, 0.0, -0.4, 0.1]]), torch.tensor([[0.5, 0.7, 0.4, 1.0]])
    noisy = clean + std * torch.randn(1, 4, generator=generator)
    found = prob_in_top_k(clean, noisy, std, top_k=2)
    for i in range(4):
        fresh = noisy.repeat(200_000, 1)
        fresh[:, i] = clean[0, i] + std[0, i] * torch.randn(200_000, generator=generator)
        share = (fresh.topk(2).indices == i).any(dim=1).float().mean()
        torch.testing.assert_close(found[0, i], share, atol=5e-3, rtol=0)


def test_noise_only_in_training() -> None:
    gate = NoisyTopKGate(3, 6, top_k=2)
    torch.nn.init.normal_(gate.weight)
    z = torch.randn(64, 4, 4, 3)
    assert torch.equal(gate.eval()(z).gates, gate(z).gates)
    assert not torch.equal(gate.train()(z).gates, gate(z).gates)


def test_balance_loss_only_in_training() -> None:
    gate = NoisyTopKGate(3, 6, top_k=2).eval()
    gate(torch.randn(8, 4, 4, 3))
    assert not hasattr(gate, "aux_loss")
    gate.train()(torch.randn(8, 4, 4, 3))
    assert gate.aux_loss > 0


def test_task_gradient_never_reaches_a_top_1_gate() -> None:
    gate = NoisyTopKGate(3, 6, top_k=1).train()
    (gate(torch.randn(8, 4, 4, 3)).gates * torch.randn(8, 1)).sum().backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad.abs().max() == 0


def test_one_expert_has_nothing_to_balance() -> None:
    gate = NoisyTopKGate(3, 1, top_k=1).train()
    assert torch.equal(gate(torch.randn(5, 4, 4, 3)).gates, torch.ones(5, 1))
    assert gate.aux_loss == 0
