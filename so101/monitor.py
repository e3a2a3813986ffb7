"""What a training run measures of itself, and its alarms in words. One for the learner, however many actors feed it."""

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from so101.schema import ACTION, RewardSpec

LAST = 20  # episodes, and successes, that the running figures look back on
KEPT = 200  # episodes among which those successes are looked for; older ones say nothing of today's classifier
COLLAPSE_NATS = 5.0  # under the target entropy: each of four entries has 0.3 of the std that the target asks for
# In a row: 3,000 updates at a look every 50. A run begins with a temperature that is far too low, and of ten good ones
# in the simulation one was still 5 nats under the target after 2,300 updates.
COLLAPSE_LOOKS = 60
SATURATED, SATURATED_SHARE = 0.99, 0.95  # an entry at its limit; a good policy keeps two of four there, never all
CONSTANT_STD = 0.02  # an entry's own noise at the target entropy is 0.15
STUCK_EPISODES, STUCK_STEPS = 5, 5  # in a row, each with so many steps of the policy's own
Q_EXCESS, Q_LOOKS = 0.2, 5  # share over what is possible, in a row: a batch's highest value is also its luckiest error
FARMED_SHARE = 0.5  # of the shortest demonstration's steps: the simulated task's policies need 1.0 of them on average
FARMED_SUCCESSES = 3  # of the last 20: one is chance
OVERRULED_SHARE = 0.2  # of the last 20 successes
# In the demonstrations' standard deviations, which one frame of theirs exceeds threefold once in 300. Of 14 random
# walks in the simulation, none had all frames beyond 3 in the demonstrations' light (+-15 %; at most 1.8), 3 had at
# +-40 % and 6 at +-60 %.
LIGHT_LIMIT = 3.0
LIGHT_FLOOR = 2.0  # of 255, the least deviation: under one fixed lamp the demonstrations' own may be next to nothing
MISSED_SHARE, UTD_STEPS = 0.2, 1000  # of the updates asked, over so many steps: 200 of them may wait for a reset
LONG_INTERVENTION, INTERVENTIONS = 30, 10  # steps, the median of the last ones: what works explores for 20 to 30
MOST_ENTROPY = len(ACTION) * math.log(2)  # nats, of an action that is uniform in -1 .. 1

CURE = "look at their ends, label the wrong ones (label.py) and train the classifier with them (train_reward.py)"
ALARMS = {
    "entropy": "policy collapsed: its entropy is {entropy:.1f}, for long far under the target of {target:g}, so it "
    "hardly explores; begin again from an earlier checkpoint, or with a larger sac.temperature_init",
    "actions": "policy collapsed: for {episodes} episodes its actions were {what}, so it no longer answers to what it "
    "sees; check that camera and state are alive, else begin again from an earlier checkpoint",
    "nan": "training has diverged: {what} is not a number any more, so nothing is learned; begin again from an earlier "
    "checkpoint with a lower sac.lr",
    "q": "Q above what is possible: the highest value is {highest:.2f} where a policy can earn {possible:.2f} at most, "
    "so the critics overestimate, often after long interventions; help more briefly, and if it stays, begin again "
    "with a lower sac.utd_ratio or more sac.critics",
    "quick": "classifier farmed: {quick} of the last {paid} successes were paid without help in under {soon:g} steps, "
    f"half of the shortest demonstration, so probably for something else; {CURE}",
    "overruled": f"classifier farmed: a person overruled {{overruled}} of the last {{paid}} successes; {CURE}",
    "light": "lighting drift at actor {actor}: camera {camera} shows a brightness of {light:.0f}, {taught:.0f} in the "
    "demonstrations, and no frame of an episode came nearer than {nearest:.1f} of their standard deviations; policy "
    "and classifier were not taught this: bring lamp, curtain and the camera's exposure back to what they were",
    "governor": "governor starved: {done:.2f} updates a step over the last {span} steps where {asked:g} are asked, so "
    "the learner is slower than the arm; lower sac.utd_ratio or sac.batch_size, raise env.reset_time_s, or give it a "
    "faster device",
    "help": "interventions too long: the last {known} took {median:g} steps at the median, and help that finishes the "
    "task drives the critics' values up; let it explore 20 to 30 steps, guide it briefly, let go",
}


def largest_return(reward: RewardSpec, discount: float) -> float:
    """The largest discounted return a policy can have: success at once, or a bonus (a penalty under 0) for ever.

    Success after n steps lies between the two, for each n.
    """
    if reward.step_penalty >= 0:
        return reward.of(True)
    return max(reward.of(True), -reward.step_penalty / (1 - discount) if discount < 1 else math.inf)


def brightness_of(demonstrations: Iterable[np.ndarray]) -> np.ndarray:
    """Mean and standard deviation of all frames' mean brightness, (cameras, 2), 0 .. 255.

    Each demonstration is its images, (n, cameras, S, S, 3) uint8.
    """
    frames = np.concatenate([images.mean(axis=(2, 3, 4)) for images in demonstrations])  # (frames, cameras)
    return np.stack([frames.mean(axis=0), frames.std(axis=0)], axis=1)


class _Step(NamedTuple):
    now: float
    action: np.ndarray
    reward: float
    by_human: bool
    light: np.ndarray  # (cameras,)
    policy_version: int
    policy_age: float


@dataclass
class _Episode:
    actor: str
    steps: int
    paid: bool  # as a success, when it ended
    success: bool  # the same, or a person's late verdict
    helped: bool


class Monitor:
    """Columns for metrics.csv from what happened, and a sentence for what goes wrong, once each time it begins."""

    def __init__(
        self, utd_ratio: float, largest_return: float, target_entropy: float, brightness: np.ndarray,
        shortest_demonstration: int, entropy_steps: float = 0.0,
    ) -> None:  # fmt: skip
        """`brightness` is what `brightness_of` gave; in `shortest_demonstration` steps one of them succeeded soonest.

        `entropy_steps` is discount / (1 - discount) where targets pay for entropy too (sac.backup_entropy).
        """
        self.utd_ratio, self.largest_return, self.target_entropy = utd_ratio, largest_return, target_entropy
        self.light, self.light_std = brightness[:, 0], np.maximum(brightness[:, 1], LIGHT_FLOOR)
        self.shortest_demonstration, self.entropy_steps = shortest_demonstration, entropy_steps
        self._running: dict[str, list[_Step]] = {}
        self._looks: deque[tuple[float, int, int]] = deque()  # now, steps, updates
        self._episodes: deque[_Episode] = deque(maxlen=KEPT)
        self._interventions: deque[int] = deque(maxlen=INTERVENTIONS)  # their steps
        self._in_a_row: Counter[str] = Counter()  # looks or episodes that were bad, by what was bad
        self._sounding: set[str] = set()
        self._unsaid: list[str] = []

    def moved(
        self, actor: str, now: float, action: np.ndarray, reward: float, by_human: bool, images: np.ndarray,
        policy_version: int, policy_age: float,
    ) -> None:  # fmt: skip
        """One environment step, done at `now` (s), that led to `images` (cameras, S, S, 3) uint8.

        `policy_version` is under 0 while actions are random; `policy_age` (s) is that of the weights that acted.
        """
        light = images.mean(axis=(1, 2, 3))
        step = _Step(now, action, reward, bool(by_human), light, policy_version, policy_age)
        self._running.setdefault(actor, []).append(step)

    def discarded(self, actor: str) -> None:
        """The actor's running episode never was; also for an actor that begins anew without having ended one."""
        self._running.pop(actor, None)

    def ended(self, actor: str, now: float, success: bool) -> dict[str, float]:
        """The columns of the actor's episode, whose last step was done at `now`. A mean of nothing is left out."""
        steps = self._running.pop(actor)
        by_human = [step.by_human for step in steps]
        lengths = [len(list(run)) for helped, run in groupby(by_human) if helped]
        own = np.array([step.action for step in steps if step.policy_version >= 0 and not step.by_human])
        light = np.array([step.light for step in steps])  # (steps, cameras)
        off = (light - self.light) / self.light_std
        drift = off.mean(axis=0)
        self._episodes.append(_Episode(actor, len(steps), bool(success), bool(success), any(by_human)))
        last = list(self._episodes)[-LAST:]
        columns = {
            "episode_steps": len(steps), "episode_return": sum(step.reward for step in steps),
            "success": float(success), "success_last_20": sum(e.success for e in last) / len(last),
            "success_alone_last_20": sum(e.success and not e.helped for e in last) / len(last),
            "reward_rate": 100 * sum(e.success for e in last) / sum(e.steps for e in last),
            "intervention_share": sum(by_human) / len(steps), "interventions": len(lengths),
            "brightness": float(light.mean()), "brightness_drift": float(drift[np.abs(drift).argmax()]),
        }  # fmt: skip
        if lengths:
            columns["intervention_length"] = sum(lengths) / len(lengths)
        if len(own):
            columns["action_size"] = float(np.abs(own).mean())
        if ages := [step.policy_age for step in steps if step.policy_version >= 0]:
            columns["policy_age"] = max(ages)  # of the oldest that still acted
        if now > steps[0].now:
            columns["actor_hz"] = (len(steps) - 1) / (now - steps[0].now)
        self._interventions.extend(lengths)
        self._judge_episode(actor, light, off, own)
        return columns

    def corrected(self, success: bool, actor: str | None = None) -> None:
        """A person's late verdict on the actor's last episode; None: on the last of all."""
        for episode in reversed(self._episodes):
            if actor in (None, episode.actor):
                episode.success = bool(success)
                break
        self._judge_successes()

    def updated(self, now: float, steps: int, updates: int, metrics: dict[str, float]) -> dict[str, float]:
        """The learner's columns: `metrics`, of which any may be missing, and its rates; both counts are of the run.

        To be called now and then also while nothing is updated, or a learner that stands still goes unnoticed.
        """
        columns = {name: float(value) for name, value in metrics.items()} | {"utd_asked": self.utd_ratio}
        looks = self._looks
        if looks and now > looks[-1][0]:
            columns["updates_per_s"] = (updates - looks[-1][2]) / (now - looks[-1][0])
        if looks and (steps == looks[-1][1] or looks[-1][2] == 0):  # before its first update the learner is not late
            looks.pop()
        looks.append((now, steps, updates))
        while len(looks) > 2 and steps - looks[1][1] >= UTD_STEPS:
            looks.popleft()
        if (span := steps - looks[0][1]) > 0:
            columns["utd_done"] = done = (updates - looks[0][2]) / span
            missed, limit = self.utd_ratio - done, MISSED_SHARE * self.utd_ratio
            if span >= UTD_STEPS:
                self._judge("governor", missed, limit, limit / 2, done=done, span=span, asked=self.utd_ratio)
        lost = [name for name in metrics if math.isnan(columns[name])]
        self._judge("nan", len(lost), 0, 0, what=", ".join(lost))
        if (entropy := columns.get("entropy")) is not None:
            low = entropy < self.target_entropy - COLLAPSE_NATS
            self._judge_run("entropy", low, COLLAPSE_LOOKS, entropy=entropy, target=self.target_entropy)
        if (highest := columns.get("q_max")) is not None:
            possible = self.largest_return + self.entropy_steps * columns.get("temperature", 0.0) * MOST_ENTROPY
            if possible > 0:
                columns["q_share"] = highest / possible
            high = highest > possible + Q_EXCESS * (possible if possible > 0 else 1.0)
            self._judge_run("q", high, Q_LOOKS, highest=highest, possible=possible)
        return columns

    def alarms(self) -> list[str]:
        """What began to go wrong since the last call, in words; said again only after it had been right meanwhile."""
        said, self._unsaid = self._unsaid, []
        return said

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from, as plain JSON values: neither times nor running episodes."""
        return {
            "episodes": [asdict(episode) for episode in self._episodes], "interventions": list(self._interventions),
            "in_a_row": dict(self._in_a_row), "sounding": sorted(self._sounding), "unsaid": list(self._unsaid),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._episodes = deque((_Episode(**episode) for episode in state["episodes"]), maxlen=KEPT)
        self._interventions = deque(state["interventions"], maxlen=INTERVENTIONS)
        self._in_a_row, self._sounding = Counter(state["in_a_row"]), set(state["sounding"])
        self._unsaid = list(state["unsaid"])

    def _judge_episode(self, actor: str, light: np.ndarray, off: np.ndarray, own: np.ndarray) -> None:
        known = len(self._interventions)
        median = float(np.median(self._interventions)) if known >= INTERVENTIONS // 2 else 0.0
        self._judge("help", median, LONG_INTERVENTION, LONG_INTERVENTION - 5, known=known, median=median)
        nearest = np.maximum(off.min(axis=0), -off.max(axis=0))  # (cameras,): no frame came nearer, all on one side
        worst = int(nearest.argmax())
        self._judge(
            "light", nearest[worst], LIGHT_LIMIT, LIGHT_LIMIT - 1, actor=actor, camera=worst + 1,
            light=light[:, worst].mean(), taught=self.light[worst], nearest=nearest[worst],
        )  # fmt: skip
        if len(own) >= STUCK_STEPS:
            share = (np.abs(own) > SATURATED).mean()
            saturated, constant = share >= SATURATED_SHARE, own.std(axis=0).max() < CONSTANT_STD
            what = f"{share:.0%} at their limits" if saturated else "all but constant"
            self._judge_run("actions", saturated or constant, STUCK_EPISODES, episodes=STUCK_EPISODES, what=what)
        self._judge_successes()

    def _judge_successes(self) -> None:
        paid = [episode for episode in self._episodes if episode.paid][-LAST:]
        overruled = sum(not episode.success for episode in paid)
        share = overruled / len(paid) if overruled >= FARMED_SUCCESSES else 0.0
        self._judge("overruled", share, OVERRULED_SHARE, OVERRULED_SHARE / 2, overruled=overruled, paid=len(paid))
        soon = FARMED_SHARE * self.shortest_demonstration
        quick = sum(episode.steps < soon and not episode.helped for episode in paid)
        self._judge("quick", quick, FARMED_SUCCESSES - 1, FARMED_SUCCESSES - 2, quick=quick, soon=soon, paid=len(paid))

    def _judge_run(self, name: str, bad: bool, times: int, **facts: float | str) -> None:
        """An alarm begins when something was bad so many times in a row, and is over once it is not."""
        self._in_a_row[name] = self._in_a_row[name] + 1 if bad else 0
        self._judge(name, self._in_a_row[name], times - 1, 0, **facts)

    def _judge(self, name: str, value: float, limit: float, ends: float, **facts: float | str) -> None:
        """An alarm begins where `value` exceeds `limit` and is over once it is down to `ends`; one for each actor."""
        key = f"{name} {facts.get('actor', '')}"
        if key in self._sounding:
            if value <= ends:
                self._sounding.remove(key)
        elif value > limit:
            self._sounding.add(key)
            self._unsaid.append(ALARMS[name].format(**facts))
