"""The HIL-SERL paper's gripper critic, for `sac.gripper: "discrete"`.

SAC moves the tool, and a DQN picks the gripper's action of three: close, stay and open, which are -1, 0 and +1 of the
action's last entry. It learns from the same rewards and alone pays for each change of mind, or the gripper chatters.
"""

from torch import Tensor, nn
from torch.nn import functional

from so101.learn.networks import ACTIVATIONS, NORM_EPS, xavier_

CHOICES = 3  # close, stay, open


class GripperCritic(nn.Module):
    """Latent (B, L) -> the values of close, stay and open (B, 3). The last hidden layer is linear, as in JAX's."""

    def __init__(self, latent_dim: int, width: int = 256, activation: str = "tanh") -> None:
        super().__init__()
        hidden1, hidden2, values = nn.Linear(latent_dim, width), nn.Linear(width, width), nn.Linear(width, CHOICES)
        for linear in (hidden1, hidden2, values):
            xavier_(linear)
        norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(hidden1, norm, ACTIVATIONS[activation](), hidden2, values)

    def forward(self, latent: Tensor) -> Tensor:
        return self.mlp(latent)  # type: ignore[no-any-return]


def choice(action: Tensor) -> Tensor:
    """Which of close, stay and open (0, 1, 2) the last entry of an action (B, 4) is nearest to: (B,) int64."""
    return action[:, -1].round().long() + 1


def gripper_target(
    reward: Tensor, penalty: Tensor, terminated: Tensor, next_q: Tensor, slow_next_q: Tensor, discount: float
) -> Tensor:
    """Double DQN: y = r + penalty + discount (1 - terminated) slow_next_q[argmax next_q], (B,) from (B,) and (B, 3)."""
    best = next_q.argmax(dim=1, keepdim=True)
    value = slow_next_q.gather(1, best).squeeze(1)
    return reward + penalty + discount * (1 - terminated.to(reward.dtype)) * value


def gripper_loss(q: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Mean square between what the values (B, 3) say of the gripper's share of `action` (B, 4) and the target (B,)."""
    taken = q.gather(1, choice(action)[:, None]).squeeze(1)
    return functional.mse_loss(taken, target)
