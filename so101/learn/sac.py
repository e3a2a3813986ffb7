"""Soft actor-critic on cached features, with the semantics of HIL-SERL's JAX code (its paper, section III).

The critics' loss trains the encoder; the actor's loss sees a finished latent and trains the actor alone.
Every method here is one update on one batch: how many of which, and when, stands in train_sac.py.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from so101.config import option, require_within
from so101.errors import ConfigError
from so101.learn.gripper import GripperCritic, gripper_loss, gripper_target
from so101.learn.networks import Critics, Policy, drop, feature_maps
from so101.learn.replay import Batch
from so101.learn.resnet10 import ResNet10
from so101.learn.weights import load_strict
from so101.schema import ACTION


@dataclass
class SacConfig:
    """The learning's settings. What differs between published variants of HIL-SERL is one line each."""

    discount: float = option(0.97, "worth of a reward one step later; 0.97 at 10 Hz looks about 3 s ahead")
    batch_size: int = option(256, "transitions in an update, half of them demonstrations")
    lr: float = option(3e-4, "Adam's step size, for critics, actor and temperature")
    tau: float = option(0.005, "share of the trained weights that the slow target copies take over each update")
    temperature_init: float = option(0.01, "worth of entropy at the start; it is adapted to target_entropy")
    target_entropy: float = option(-2.0, "entropy to hold, in nats; -2 is minus half the action's four entries")
    critics: int = option(2, "critics in the ensemble")
    subsample: int | None = option(None, "critics drawn for each target (REDQ, RLPD); null takes all of them")
    actor_q: Literal["mean", "min"] = option("mean", "the actor climbs the critics' mean (HIL-SERL) or minimum")
    backup_entropy: bool = option(False, "whether targets pay for entropy too, as in the first SAC paper")
    activation: Literal["tanh", "silu"] = option("tanh", "between layers: tanh (HIL-SERL) or silu (LeRobot)")
    dropout: float = option(0.1, "share of the image embedding dropped when the actor is trained; never when it acts")
    utd_ratio: float = option(2.0, "critic updates per environment step")
    actor_every: int = option(2, "critic updates per update of actor and temperature")
    gripper: Literal["continuous", "discrete"] = option(
        "continuous", "an entry of the action like the others, or close, stay and open by a critic of their own"
    )
    gripper_penalty: float = option(-0.02, "what the discrete gripper's critic is paid for each change of mind")
    n_obs_steps: Literal[1, 3] = option(1, "newest frames seen at once, each shifted by itself; the state once")
    features: Literal["cached", "pixels", "trained"] = option(
        "cached",
        "cached: a frame is encoded once; pixels: anew in each batch, which checks the cache; trained: the encoder "
        "learns too, each frame shifted anew in each batch",
    )
    encoder_lr: float = option(1e-4, "Adam's step size for the encoder, where it is trained")
    views: int = option(4, "randomly shifted views cached for each frame; 0 trains on the unshifted one")
    pad: int = option(4, "largest shift in pixels, each way")
    buffer_size: int = option(30_000, "online observations kept; with 4 views about 130 KB each per camera")

    def __post_init__(self) -> None:
        require_within(
            self, discount=(0, 1), batch_size=(2, 65_536), lr=(0, 1), tau=(0, 1), temperature_init=(1e-9, 1e3),
            critics=(1, 100), dropout=(0, 0.9), utd_ratio=(0, 1000), actor_every=(1, 1000), views=(0, 80),
            pad=(0, 16), buffer_size=(100, 10_000_000), gripper_penalty=(-1000, 0), encoder_lr=(0, 1),
        )  # fmt: skip
        if self.subsample is not None and not 1 <= self.subsample <= self.critics:
            raise ConfigError(f"subsample: got {self.subsample}, must be 1 .. critics ({self.critics}) or null")


def td_target(reward: Tensor, terminated: Tensor, next_q: Tensor, discount: float) -> Tensor:
    """y = r + discount (1 - terminated) min_e next_q, all (B,) but next_q (E, B).

    A truncated transition is not terminated: time ran out, but the next state still had this value.
    """
    return reward + discount * (1 - terminated.to(reward.dtype)) * next_q.amin(dim=0)


def make_policy(config: SacConfig, cameras: int, size: int) -> Policy:
    """The policy that `config` asks for, untrained; `size` is a feature map's, image_size / 32."""
    discrete = config.gripper == "discrete"
    actions = len(ACTION) - 1 if discrete else len(ACTION)
    policy = Policy(cameras * config.n_obs_steps, size, config.activation, actions)
    if discrete:
        policy.gripper = GripperCritic(policy.encoder.latent_dim, activation=config.activation)
    if config.features == "trained":
        policy.trunk = ResNet10()
    return policy


class Sac(nn.Module):
    """Policy, critics, their slow target copies and the temperature, each with the update that trains it.

    Metrics are returned as tensors, so that an update never waits for the device; ask for them now and then.
    """

    def __init__(
        self,
        config: SacConfig,
        cameras: int,
        device: torch.device | str = "cpu",
        size: int = 4,
        trunk: ResNet10 | None = None,
    ) -> None:
        """`size` is a feature map's, image_size / 32; `trunk` is what a trained encoder starts from, None: at random.

        torch.manual_seed before it seeds weights and noise.
        """
        super().__init__()
        self.config = config
        self.policy = policy = make_policy(config, cameras, size)
        if policy.trunk is not None and trunk is not None:
            policy.trunk.load_state_dict(trunk.state_dict())
        latent = policy.encoder.latent_dim
        self.critics = Critics(latent, config.critics, activation=config.activation, actions=policy.actions)
        self.target_encoder = copy.deepcopy(policy.encoder)
        self.target_critics = copy.deepcopy(self.critics)
        self.target_gripper, self.target_trunk = copy.deepcopy((policy.gripper, policy.trunk))  # None without one
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature_init).log())
        self.to(device)
        self.generator = torch.Generator(device=device).manual_seed(int(torch.randint(2**31, ())))
        self._slow = _parameters(self.target_encoder, self.target_critics, self.target_gripper, self.target_trunk)
        for parameter in self._slow:
            parameter.requires_grad_(False)
        heads, encoder = _parameters(policy.encoder, self.critics, policy.gripper), _parameters(policy.trunk)
        self._fast = heads + encoder
        self._actor = _parameters(policy.actor)
        groups = [{"params": heads, "lr": config.lr}]
        if encoder:
            groups.append({"params": encoder, "lr": config.encoder_lr})
        options: dict[str, Any] = {"fused": True, "capturable": torch.device(device).type == "cuda"}  # see captured.py
        self.critic_optimizer = torch.optim.Adam(groups, **options)
        self.actor_optimizer = torch.optim.Adam(self._actor, config.lr, **options)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], config.lr, **options)

    def update(self, batch: Batch, actor: bool) -> dict[str, Tensor]:
        """One update on a batch: critics and encoder, where `actor` policy and temperature too, then the slow copies.

        Returns what each measured, scalars by name.
        """
        metrics = self.update_critic(batch)
        if actor:
            metrics |= self.update_actor(batch)
            metrics |= self.update_temperature(metrics.pop("log_prob"))
        self.update_targets()
        return metrics

    def update_critic(self, batch: Batch) -> dict[str, Tensor]:
        """One step of critics and encoder towards the TD target: mean square over critics and batch.

        A gripper's critic adds its own loss, and the sum of both trains the encoder.
        """
        y, gripper_y = self._targets(batch)
        latent = self.policy.encoder(self.policy.look(batch.features), self.policy.normalizer(batch.state))
        q = self.critics(latent, batch.action[:, : self.policy.actions])  # (E, B)
        loss = (q - y).square().mean()
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "td_target": y.mean()}
        metrics |= {"q_max": q.detach().amax(), "q_spread": q.detach().std()}
        if self.policy.gripper is not None and gripper_y is not None:
            of_gripper = gripper_loss(self.policy.gripper(latent), batch.action, gripper_y)
            metrics["gripper_loss"] = of_gripper.detach()
            loss = loss + of_gripper
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return metrics

    @torch.no_grad()
    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The critics' targets (B,), and those of a gripper's critic.

        Next actions are chosen by the online networks, their values told by the slow copies.
        """
        encoder, seen = self.policy.encoder, batch.next_features
        features = self.policy.look(seen).float()  # once for both encoders
        slow_features = features if self.target_trunk is None else feature_maps(self.target_trunk, seen)
        state = self.policy.normalizer(batch.next_state)
        embedded = encoder.embed(features)
        next_action, log_prob = self._sample(encoder.join(self._drop(embedded), state))
        slow_latent = self.target_encoder(slow_features, state)
        next_q = self.target_critics(slow_latent, next_action)
        if self.config.subsample is not None:
            # no randperm: a CUDA graph (captured.py) is known to replay rand
            order = torch.rand(len(next_q), generator=self.generator, device=next_q.device).argsort()
            next_q = next_q[order[: self.config.subsample]]
        if self.config.backup_entropy:
            next_q = next_q - self.log_temperature.exp() * log_prob
        y = td_target(batch.reward, batch.terminated, next_q, self.config.discount)
        if self.policy.gripper is None or self.target_gripper is None:
            return y, None
        values = self.policy.gripper(encoder.join(embedded, state)), self.target_gripper(slow_latent)
        penalty = self.config.gripper_penalty * batch.changed
        return y, gripper_target(batch.reward, penalty, batch.terminated, *values, self.config.discount)

    def update_actor(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the actor up the critics' value plus entropy; returns the batch's log_prob (B,) too."""
        encoder = self.policy.encoder
        with torch.no_grad():
            state = self.policy.normalizer(batch.state)
            embedded = encoder.embed(self.policy.look(batch.features))
            latent = encoder.join(embedded, state)
            actor_latent = encoder.join(self._drop(embedded), state) if self.config.dropout else latent
            temperature = self.log_temperature.exp()
        action, log_prob = self._sample(actor_latent)
        q = self.critics(latent, action)
        value = q.mean(dim=0) if self.config.actor_q == "mean" else q.amin(dim=0)
        loss = (temperature * log_prob - value).mean()
        self.actor_optimizer.zero_grad()
        loss.backward(inputs=self._actor)  # through the critics, without gradients for them
        self.actor_optimizer.step()
        log_prob = log_prob.detach()
        return {"actor_loss": loss.detach(), "entropy": -log_prob.mean(), "log_prob": log_prob}

    def update_temperature(self, log_prob: Tensor) -> dict[str, Tensor]:
        """One step of the temperature: up where the policy's entropy is under target_entropy, else down."""
        loss = self.log_temperature.exp() * (-log_prob.mean() - self.config.target_entropy)
        self.temperature_optimizer.zero_grad()
        loss.backward()
        self.temperature_optimizer.step()
        return {"temperature": self.log_temperature.detach().exp()}

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move each slow copy by tau towards what it copies."""
        torch._foreach_lerp_(self._slow, self._fast, self.config.tau)

    def _sample(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(latent), self.policy.actions, generator=self.generator, device=latent.device)
        return self.policy.actor.sample(latent, noise)

    def _drop(self, embedded: list[Tensor]) -> list[Tensor]:
        rate = self.config.dropout
        return [drop(image, rate, self.generator) for image in embedded] if rate else embedded

    def policy_tensors(self) -> dict[str, Tensor]:
        """A copy on the CPU of all that the actor needs: the whole policy."""
        return {name: tensor.cpu().clone() for name, tensor in self.policy.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """A copy on the CPU of every network, target copies and temperature included."""
        return {name: tensor.cpu().clone() for name, tensor in self.state_dict().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave. Raises DataError for a tensor missing, extra or misshapen."""
        load_strict(self, tensors, "checkpoint")

    def training_state(self) -> dict[str, Any]:
        """What else the next update depends on: the optimisers' moments and the noise generator's state."""
        state: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in self._optimizers().items()}
        return copy.deepcopy({**state, "generator": self.generator.get_state()})

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `training_state` was taken, except that the step size is this config's."""
        for name, optimizer in self._optimizers().items():
            optimizer.load_state_dict(copy.deepcopy(state[name]))
            for group, lr in zip(optimizer.param_groups, (self.config.lr, self.config.encoder_lr), strict=False):
                group.update(lr=lr, capturable=optimizer.defaults["capturable"])  # not every checkpoint says so
        self.generator.set_state(state["generator"])

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": self.critic_optimizer,
            "actor": self.actor_optimizer,
            "temperature": self.temperature_optimizer,
        }


def _parameters(*modules: nn.Module | None) -> list[Tensor]:
    return [parameter for module in modules if module is not None for parameter in module.parameters()]
