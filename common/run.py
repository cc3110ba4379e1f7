"""The bookkeeping of one RL run: its clock, logs, evaluations, checkpoints and last report."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from common.agents import check_same_agent, check_task
from common.audit import Alarm
from common.checkpoint import load_checkpoint, load_meta, rng_state, save_checkpoint, set_rng_state
from common.evaluation import Evaluation, Mistake, evaluate, record_traces, replay
from common.experience import Replay
from common.hard_frames import HardFrames
from common.log import LoggerConfig, RunLog
from common.report import plot_learning_curves, plot_scores
from common.runtime import UserError
from common.trace_page import save_trace_page
from common.video import save_video

# Training, its evaluations, the final one and the video: none begins where another does, nor where collect.py
# has recorded with the same seed. Training's: TRAIN_SEED + run seed + step resumed at.
EVAL_SEED, FINAL_SEED, VIDEO_SEED, TRAIN_SEED = 10**9, 2 * 10**9, 3 * 10**9, 4 * 10**9


class Fooled(UserError):
    """The alarm ends the run (`reward.audit.action: stop`)."""


@dataclass
class RunnerConfig:
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(experiment_name="rl"))
    seed: int = 0
    device: str = "auto"
    num_threads: int = 1  # of torch in the learner
    max_steps: int = 1_000_000  # env steps, all envs together
    log_interval: int = 500  # env steps
    val_check_interval: int = 0  # env steps between evaluations; 0: only at the end
    num_eval_episodes: int = 20  # per evaluation during training
    save_interval: int = 0  # env steps between checkpoints; 0: only at the end
    num_final_episodes: int = 100  # fresh ones, for the best checkpoint
    num_video_episodes: int = 6
    only_eval: bool = False  # evaluate the checkpoint in resume_dir, train nothing
    resume_dir: str | None = None  # a checkpoint folder
    async_rollout: bool = False  # SAC: envs in a process of their own, the learner never waits for them

    def __post_init__(self):
        if self.log_interval < 1:
            raise ValueError(f"log_interval must be at least 1, got {self.log_interval}")
        if self.only_eval and self.resume_dir is None:
            raise ValueError("only_eval needs resume_dir: a checkpoint folder to evaluate")


class Run:
    """The parts of one run, its clock, and what happens every so many env steps."""

    def __init__(
        self,
        runner: RunnerConfig,
        folder: Path,
        agent,
        agent_meta: dict,
        envs,
        client,
        log: RunLog,
        alarm: Alarm | None = None,
        film_fps: int | None = None,
    ):
        """envs: those for evaluation; agent_meta: what a checkpoint says of the agent (`common.agents`);
        film_fps: of the video of the first mistake, None where an evaluation cannot be played once more."""
        self.runner, self.folder, self.agent, self.agent_meta = runner, folder, agent, agent_meta
        self.eval_envs, self.client, self.log = envs, client, log
        self.alarm, self.film_fps = alarm, film_fps
        self.step = 0  # env steps, all envs together
        self.merit: tuple[float, float] | None = None
        self.best_step: int | None = None
        self.owes_evaluation = False  # one that was put off
        self.replay: Replay | None = None  # SAC's; saved with `last`
        self.refreshed: str | None = None  # checkpoint of the reward model that took over from the config's
        self.asked_for = client.cfg.model_name if client is not None else None  # the config's
        self.hard: HardFrames | None = None  # is shown what the reward model judged in training
        self.start = self.logged_at = time.perf_counter()
        self.logged_step = 0

    @property
    def running(self) -> bool:
        return self.step < self.runner.max_steps

    def _due(self, every: int, before: int, now: int) -> bool:
        """Whether a multiple of `every` lies in (before, now], or the run ends there; 0: never."""
        return every > 0 and (before // every != now // every or now >= self.runner.max_steps)

    def evaluates_after(self, env_steps: int) -> bool:
        """Whether the next evaluation follows these env steps: the reward model must be idle by then."""
        now = self.step + env_steps
        due = self._due(self.runner.val_check_interval, self.step, now) or now >= self.runner.max_steps
        return due or self.owes_evaluation

    def advance(self, env_steps: int, losses: dict, rollout_metrics, may_evaluate: bool = True) -> bool:
        """Count env steps; log, evaluate and save when due. rollout_metrics: called when logged.

        may_evaluate: False puts off an evaluation that is due, until the run's end at most. -> whether there
        was one.
        """
        before, self.step = self.step, self.step + env_steps
        runner = self.runner
        if self._due(runner.log_interval, before, self.step):
            now = time.perf_counter()
            speed = (self.step - self.logged_step) / (now - self.logged_at)
            self.logged_at, self.logged_step = now, self.step
            numbers = {f"train/{name}": float(value) for name, value in losses.items()}
            clock = {"time/env_steps_per_s": speed} | (self.client.clock() if self.client is not None else {})
            if self.weight_factor != 1:
                clock["reward/weight"] = self.weight_factor
            # an asynchronous rollout has a client of its own, and its clock counts
            self._log(numbers | clock | rollout_metrics())
        self.owes_evaluation |= self._due(runner.val_check_interval, before, self.step)
        evaluates = self.owes_evaluation and (may_evaluate or not self.running)
        if evaluates:
            self.owes_evaluation = False
            self.evaluate()
        if self._due(runner.save_interval, before, self.step):
            self.save("last")
        return evaluates

    def _log(self, metrics: dict[str, float]) -> None:
        """Log, and let the alarm hear of it. UserError where that is to end the run."""
        self.log.log(self.step, metrics)
        message = self.alarm.hear(metrics) if self.alarm is not None else None
        if message is None:
            return
        action = self.alarm.cfg.action
        if action == "stop" and self.running:
            raise Fooled(f"{message} (action: stop)")
        if action == "lower":
            message += f"; reward.reward_weight is multiplied by {self.weight_factor:g} from here on"
        self.log.say(f"step {self.step:,}: {message}")

    def evaluate(self) -> Evaluation:
        """Measure the policy; keep it as `best` if the reward model likes it as well as any before."""
        start = time.perf_counter()
        result = self.judge(self.runner.num_eval_episodes, EVAL_SEED)
        if self.merit is None or result.merit >= self.merit:
            self.merit, self.best_step = result.merit, self.step
            self.save("best")
        self._log(result.metrics)
        self.logged_at += time.perf_counter() - start  # not the training's time
        return result

    def save(self, name: str) -> None:
        """`best` holds the agent; `last` all that is needed to go on."""
        state = {"agent": self.agent.state_dict()}
        if name == "last":
            state |= {"rng": rng_state(), "replay": self.replay.state_dict() if self.replay else None}
        meta = {**self.agent_meta, "step": self.step, "best_step": self.best_step, "merit": self.merit}
        meta |= {"reward_weight_factor": self.weight_factor}
        meta |= {"reward_model": self.asked_for, "refreshed_reward_model": self.refreshed}
        save_checkpoint(self.folder / "checkpoints" / name, state, meta)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of an earlier run. UserError if it belongs to another task or agent."""
        state, meta = load_checkpoint(folder, self.agent.device)
        check_task(meta, self.eval_envs.spec, folder)
        check_same_agent(meta, self.agent_meta, folder)
        self.agent.load_state_dict(state["agent"])
        self.step = self.logged_step = meta["step"]
        self.best_step = meta["best_step"]
        best, ours = folder.parent / "best", self.folder / "checkpoints" / "best"
        if not self.runner.only_eval and meta["merit"] is not None and best.exists():
            self.merit = tuple(meta["merit"])  # what comes must beat what was there
            if best.resolve() != ours.resolve():
                state_of_best, meta_of_best = load_checkpoint(best)
                save_checkpoint(ours, state_of_best, meta_of_best)
        if self.alarm is not None:
            self.alarm.weight = meta.get("reward_weight_factor", 1.0)
        if "buffer" in state:
            raise UserError(
                f"{folder} was saved by an older version, whose replay buffer this one cannot read"
            )
        if self.replay is not None and state.get("replay") is not None:
            self.replay.load_state_dict(state["replay"])
        if "rng" in state:
            set_rng_state(state["rng"])

    def take_over(self, folder: Path) -> None:
        """Judge by the refreshed reward model that the checkpoint's run ended with, if there is one and the
        config names the model that it came from: call it before anything is judged."""
        meta = load_meta(folder)
        path = meta.get("refreshed_reward_model")
        if path is None or self.client is None:
            return
        if meta["reward_model"] != self.asked_for:
            self.log.say(
                f"the reward model is {self.asked_for}, as the config says, and not the refreshed {path}"
            )
            return
        if not Path(path).exists():
            raise UserError(f"{folder} was trained on the refreshed reward model {path}, which is gone")
        self.client.swap(path)
        self.refreshed = path
        self.log.say(f"the reward model is the refreshed one, {path}")

    def replaced_by(self, model_path: str) -> None:
        """Another reward model judges from here on. The merits of two models do not compare, so `best` is
        chosen anew, and the alarm forgets."""
        self.refreshed, self.merit = model_path, None
        if self.alarm is not None:
            self.alarm.forget()

    def judge(self, num_episodes: int, seed: int) -> Evaluation:
        seed += self.runner.seed
        result = evaluate(self.eval_envs, self.agent, self.client, num_episodes, seed)
        if result.first_mistake is not None and self.film_fps and not self.film.exists():
            self._film(seed, result.first_mistake)
        return result

    @property
    def weight_factor(self) -> float:
        """Of `reward_weight`, from here on: below 1 where the alarm has lowered it."""
        return 1.0 if self.alarm is None else self.alarm.weight

    @property
    def film(self) -> Path:
        """Of the first episode in an evaluation that the model calls a success and that is none."""
        return self.folder / "first_false_positive.mp4"

    def _film(self, seed: int, mistake: Mistake) -> None:
        trace = replay(self.eval_envs, self.agent, self.client, seed, mistake.env, mistake.episode)
        trace.title = f"fooled at env step {self.step:,}"
        save_video([trace], self.client.threshold, self.film, self.film_fps)
        self.log.say(
            f"step {self.step:,}: an evaluation is fooled for the first time, at step {mistake.step} of an "
            f"episode (score {trace.score[mistake.step]:.3f}): {self.film}"
        )

    def load_best(self) -> None:
        state, _ = load_checkpoint(self.folder / "checkpoints" / "best", self.agent.device)
        self.agent.load_state_dict(state["agent"])

    def measure(self) -> dict:
        """The present agent on fresh episodes. -> the core of summary.json."""
        metrics = self.judge(self.runner.num_final_episodes, FINAL_SEED).metrics
        final = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        self.log.log(self.step, {f"final/{name}": value for name, value in final.items()})
        asks_frames = self.client is not None and not self.client.cfg.of_windows
        threshold = self.client.threshold if asks_frames else None
        return {**final, "env_steps": self.step, "best_step": self.best_step, "reward_threshold": threshold}

    def draw_why(self, fps: int, plays: bool) -> None:
        """After the alarm: what one wants to look at then. plays: the present agent may act for it, which an
        arm is spared."""
        if not plays:
            return plot_learning_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        if self.client is not None:
            self.client.receive(wait=True)  # verdicts that were under way
        self.draw(fps)

    def draw(self, fps: int) -> None:
        """curves.png, and of fresh episodes of the present agent traces.html, scores.png and eval.mp4."""
        runner = self.runner
        if not runner.only_eval:
            plot_learning_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        if runner.num_video_episodes:
            traces = record_traces(
                self.eval_envs, self.agent, self.client, runner.num_video_episodes, VIDEO_SEED + runner.seed
            )
            threshold = self.client.threshold if self.client is not None else 1.0
            title, note = str(self.folder), "Fresh episodes of the policy."
            save_trace_page(traces, threshold, self.folder / "traces.html", title, fps, note)
            plot_scores(traces, threshold, self.folder / "scores.png")
            save_video(traces, threshold, self.folder / "eval.mp4", fps)
