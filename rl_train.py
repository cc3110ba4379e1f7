"""Reinforcement learning on env reward, a learned reward, or both: PPO or SAC, with true success beside it.

    python rl_train.py configs/demo_rl.yaml [key=value ...]
    python rl_train.py configs/realworld_sac_demo.yaml                (an arm: common/robot_run.py)

In: a task (`env.train`, `env.eval`), a learner (`algorithm`, `actor`), who pays (`reward`), when to stop
(`runner`). Out, in the run folder: `config.yaml`, `metrics.jsonl` (and TensorBoard), `checkpoints/best`,
`checkpoints/last`, `summary.json`, `curves.png`, `traces.html`, `scores.png`, `eval.mp4`, and
`first_false_positive.mp4` where an evaluation met one.

The best checkpoint is chosen by *learned* success (with `reward.shaping` by the env reward); true success is
measured, logged and never used. Ctrl-C (at an arm `q` and SIGTERM too, and an arm, camera or mouse that is
lost) saves `checkpoints/last`; `runner.resume_dir=RUN_FOLDER/checkpoints/last` goes on from there in a new
folder.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import trange

from common import config
from common.agents import agent_meta, build_agent
from common.async_rollout import AsyncRollout, RolloutConfig
from common.audit import Alarm
from common.experience import EpisodeStats, Replay, Rollout
from common.files import gone_if_refused, new_run_dir, save_json
from common.judging import distance_of, hear, make_audit, make_shaping, make_watch, pay
from common.log import RunLog
from common.ppo import PPO
from common.prior import Prior, prior_buffer
from common.processes import WorkerError
from common.refresh import Refresher
from common.reward_client import RewardClient
from common.rewards import add_bootstrap, combine_reward, no_bootstrap
from common.rl_config import Config
from common.run import TRAIN_SEED, Fooled, Run
from common.runtime import UserError, pick_device, run_script, seed_everything, set_threads, versions
from common.sac import SAC
from common.worlds import keep_hard, open_arm, open_simulation
from common.wrappers import EpisodeRecorder

PUBLISH_EVERY = 10  # updates between two handings of fresh weights to an asynchronous rollout

# ----------------------------------------------------------------------------------------------------
# PPO
# ----------------------------------------------------------------------------------------------------


def train_ppo(cfg: Config, run: Run, agent: PPO, envs, client: RewardClient | None) -> None:
    algorithm, n = cfg.algorithm, envs.num_envs
    audit, stats, watch = (
        make_audit(cfg.reward),
        EpisodeStats(n, cfg.reward),
        make_watch(cfg.reward, client, n),
    )
    decision = None if client is None else client.decision(n)
    shaping = make_shaping(cfg.reward, algorithm.gamma, watch.num_slots)
    obs = envs.reset(TRAIN_SEED + cfg.runner.seed + run.step)
    while run.running:
        steps, looks, infos = [], [], []
        for t in range(algorithm.num_steps):
            action, logprob, value = agent.act_with_value(obs)
            step = envs.step(action.clamp(-1, 1).to(envs.device), watch.render())
            distance = distance_of(envs.spec, step.next_obs)
            looks.append(watch.look(step.frames, step.frame_ids, step.success, step.done, distance))
            if client is not None:
                client.submit(looks[-1].data, t * watch.num_slots + looks[-1].slots)
            if run.hard is None or not run.hard.room:
                looks[-1].data = {}
            infos.append(step.info)
            steps.append({"obs": obs, "action": action, "logprob": logprob, "value": value, **step.arrays})
            obs = step.obs
        rollout = {
            key: torch.stack([s[key] for s in steps]).to(agent.device) for key in steps[0]
        }  # (T, N, ..)

        # The verdicts have been coming in while the envs moved; only now are they needed.
        paid = verdict = torch.zeros(algorithm.num_steps, watch.num_slots)
        learned = torch.zeros(verdict.shape, dtype=torch.bool)
        ends = rollout["terminated"].cpu(), rollout["truncated"].cpu()
        done = ends[0] | ends[1]
        if client is not None:
            heard = hear(client, looks, done, decision, audit)
            paid, verdict, learned = heard.paid, heard.paid, heard.learned
            if run.hard is not None:
                for look, prob, *rest in zip(looks, heard.score, infos, done, strict=True):
                    run.hard.keep(look.data, look.slots, prob, client.threshold, *rest)
        if shaping is not None:
            paid = shaping(heard.score, no_bootstrap(*ends, algorithm.bootstrap_type), done)
        lengths, bonus = (torch.stack([vars(look)[name] for look in looks]) for name in ("lengths", "bonus"))
        model_reward = pay(cfg.reward, paid, lengths, bonus, done).to(agent.device)
        reward = combine_reward(
            rollout["env_reward"],
            model_reward,
            cfg.reward.env_reward_weight,
            cfg.reward.reward_weight * run.weight_factor,
        )
        for row in zip(rollout["success"].cpu(), done, learned, verdict, strict=True):
            stats.add(*row)
        done = done.to(agent.device)
        final_value = torch.zeros_like(reward)
        if done.any():
            final_value[done] = agent.value(rollout["next_obs"][done])
        reward = add_bootstrap(
            reward,
            final_value,
            rollout["terminated"],
            rollout["truncated"],
            algorithm.gamma,
            algorithm.bootstrap_type,
        )
        last_value = agent.value(obs.to(agent.device))
        losses = agent.update(
            {**rollout, "reward": reward, "done": done, "last_value": last_value},
            progress=run.step / cfg.runner.max_steps,
        )
        audit.step(algorithm.num_steps * n)
        run.advance(algorithm.num_steps * n, losses, lambda: {**stats.metrics(), **audit.metrics()})


# ----------------------------------------------------------------------------------------------------
# SAC
# ----------------------------------------------------------------------------------------------------


def relabelled_prior(cfg: Config, run: Run, client: RewardClient | None) -> Prior:
    """Prior data as the reward model pays it now."""
    prior = prior_buffer(
        cfg.algorithm.prior_folders,
        run.eval_envs.spec,
        client,
        cfg.reward,
        cfg.algorithm.bootstrap_type,
        run.agent.device,
        cfg.algorithm.gamma,
    )
    run.log.log(run.step, prior.audit.metrics("prior"))
    return prior


def start_sac(cfg: Config, run: Run, agent: SAC, client: RewardClient | None) -> Replay:
    """The replay buffer, prior data relabelled by the reward model (RLPD), and the updates on it alone."""
    prior = relabelled_prior(cfg, run, client) if cfg.algorithm.prior_folders else None
    if cfg.actor.model.norm_obs:
        if prior is None:
            raise UserError(
                "actor.model.norm_obs takes mean and std from algorithm.prior_data: name a folder"
            )
        obs = prior.buffer.field("obs")
        agent.set_obs_stats(obs.mean(0), obs.std(0))
    replay = Replay(cfg.algorithm, run.eval_envs.spec, prior, agent.device)
    run.replay = replay
    if cfg.runner.resume_dir is not None:
        run.resume(Path(cfg.runner.resume_dir))
        return replay
    for _ in trange(cfg.algorithm.offline_updates, desc="updates on prior data", leave=False):
        agent.update(replay.sample(agent.generator))
    return replay


def train_sac(cfg: Config, run: Run, agent: SAC, envs, client: RewardClient | None) -> None:
    algorithm, one_arm = cfg.algorithm, cfg.env.at_an_arm
    replay = start_sac(cfg, run, agent, client)
    refresher = None
    if cfg.reward.refresh_every:
        refresher = Refresher(cfg.reward, run.folder, client, run.hard, run.log.say, run.refreshed)
    memory = refresher.memory if refresher is not None else None
    parts = cfg.reward, algorithm.bootstrap_type, algorithm.gamma, run.hard, memory
    rollout = Rollout(envs, client, *parts)
    rollout.reset(TRAIN_SEED + cfg.runner.seed + run.step)
    updates_owed, losses = 0.0, {}
    while run.running:
        action = agent.act(rollout.obs)
        if run.step < algorithm.learning_starts:
            action = torch.rand_like(action) * 2 - 1
        rollout.weight_factor = run.weight_factor
        rollout.start(action)
        if run.step >= algorithm.learning_starts and replay.ready:
            updates_owed += algorithm.utd * envs.num_envs
        while updates_owed >= 1:  # the envs move meanwhile
            losses = agent.update(replay.sample(agent.generator))
            updates_owed -= 1
        paid = list(rollout.finish())
        if run.evaluates_after(envs.num_envs):  # it will ask the same reward model
            paid += rollout.drain()
        for transitions in paid:
            replay.add(transitions)
        if refresher is not None and refresher.due(run.step, run.step + envs.num_envs):
            refresh_reward(cfg, run, refresher, rollout, replay)
        may_evaluate = rollout.between_episodes or not one_arm
        if run.advance(envs.num_envs, losses, rollout.metrics, may_evaluate) and one_arm:
            rollout.reset(None)  # the arm has been elsewhere meanwhile


def refresh_reward(cfg: Config, run: Run, refresher: Refresher, rollout: Rollout, replay: Replay) -> None:
    """A better reward model from here on, and for what it has paid for so far."""
    for transitions in rollout.drain():  # nothing may be under way to the model
        replay.add(transitions)
    step = run.step + rollout.num_envs  # the one that has just been taken counts
    if not refresher.refresh(step):
        return
    run.log.log(run.step, rollout.metrics())  # of the model before; the alarm need not hear of it
    client = refresher.client
    rollout.decision = client.decision(rollout.num_envs)
    count = refresher.memory.pay_again(replay.online, client, cfg.reward.reward_weight)
    run.log.say(f"step {step:,}: {count} judged frames of the replay buffer are paid anew")
    if replay.prior is not None:
        prior = relabelled_prior(cfg, run, client)
        replay.prior = prior.buffer
    run.replaced_by(client.cfg.model.model_path)


def train_sac_async(cfg: Config, run: Run, agent: SAC, client: RewardClient | None) -> None:
    """Envs, policy and reward model in a process of their own; the learner takes what has come."""
    replay = start_sac(cfg, run, agent, client)
    rollout_cfg = RolloutConfig(
        env=cfg.env.train,
        reward=cfg.reward,
        algorithm=cfg.algorithm,
        model=cfg.actor.model,
        optim=cfg.actor.optim,
        seed=TRAIN_SEED + cfg.runner.seed + run.step,
        random_steps=max(0, cfg.algorithm.learning_starts - run.step),
        log_interval=cfg.runner.log_interval,
    )
    updates, losses, metrics = 0, {}, {}
    with AsyncRollout(rollout_cfg, agent.actor_state()) as rollout:
        while run.running:
            batches, env_steps, fresh_metrics = rollout.receive()
            metrics.update(fresh_metrics)
            for transitions in batches:
                replay.add(transitions)
            if run.step >= cfg.algorithm.learning_starts and replay.ready:
                losses = agent.update(replay.sample(agent.generator))
                updates += 1
                if updates % PUBLISH_EVERY == 0:
                    rollout.publish(agent.actor_state())
            elif not batches:
                time.sleep(0.002)
            if env_steps:
                run.advance(env_steps, {**losses, "updates": updates}, lambda: _take_all(metrics))


def _take_all(metrics: dict[str, float]) -> dict[str, float]:
    """What has come since the last line of the log, once."""
    taken = dict(metrics)
    metrics.clear()
    return taken


# ----------------------------------------------------------------------------------------------------
# One run
# ----------------------------------------------------------------------------------------------------


def let_critic_score(envs, agent: PPO | SAC):
    """The envs; a recorder among them may ask the agent's critic (`data_collection.gae_gamma`)."""
    if isinstance(envs, EpisodeRecorder):
        envs.value = agent.value
    return envs


def learn(cfg: Config, run: Run, agent: PPO | SAC, client: RewardClient | None, make_train_envs) -> None:
    """Train, keep `best` and `last`, and leave the best agent in `agent`."""
    try:
        if cfg.runner.async_rollout:
            train_sac_async(cfg, run, agent, client)
        elif cfg.algorithm.name == "sac":
            train_sac(cfg, run, agent, make_train_envs(), client)
        else:
            if cfg.runner.resume_dir is not None:
                run.resume(Path(cfg.runner.resume_dir))
            train_ppo(cfg, run, agent, make_train_envs(), client)
        run.save("last")
        if run.merit is None:
            run.evaluate()
    except (KeyboardInterrupt, SystemExit, UserError, WorkerError) as error:  # of ArmError and SIGTERM too
        if run.step or not isinstance(error, UserError):  # before the first step it says what does not fit
            run.save("last")
            print(f"\nstopped at step {run.step}; go on with runner.resume_dir={run.folder}/checkpoints/last")
        if isinstance(error, Fooled):
            run.draw_why(cfg.env.fps, plays=not cfg.env.at_an_arm)
        raise
    run.load_best()


def check_inputs(cfg: Config) -> None:
    """Say what is missing before a run folder appears and simulations start."""
    inputs = [("runner.resume_dir", cfg.runner.resume_dir)]
    if cfg.algorithm.name == "sac":
        inputs += [("algorithm.prior_data", folder) for folder in cfg.algorithm.prior_folders]
    if cfg.reward.use_reward_model:
        inputs += cfg.reward.model_files.items()
    for key, path in inputs:
        if path is not None and not Path(path).exists():
            raise UserError(f"{key}: {path} does not exist; run the step that makes it, or name another")


def main() -> None:
    cfg = config.load(Config, description=__doc__)
    check_inputs(cfg)
    start = time.perf_counter()
    set_threads(cfg.runner.num_threads)
    seed_everything(cfg.runner.seed)
    folder = new_run_dir(cfg.runner.logger.log_path, cfg.runner.logger.experiment_name)
    config.save(cfg, folder / "config.yaml")
    with gone_if_refused(folder), ExitStack() as stack:
        env, pixels = cfg.env, cfg.actor.model.pixels
        if env.at_an_arm:
            world = open_arm(env.train, cfg.devices, cfg.reward, pixels, folder, cfg.runner.seed, stack)
        else:
            world = open_simulation(env.train, env.eval, cfg.reward, pixels, folder, stack)
        eval_envs, make_train_envs, client = world
        parts = (cfg.algorithm, cfg.actor.model, cfg.actor.optim, eval_envs.spec)
        if client is not None:
            client.set_task(eval_envs.spec.task_description)
        # Once more: how many random numbers went by until here depends on which parts live in this process.
        seed_everything(cfg.runner.seed)
        agent = build_agent(*parts, pick_device(cfg.runner.device))
        let_critic_score(eval_envs, agent)
        log = stack.enter_context(RunLog(folder, cfg.runner.logger.logger_backends))
        alarm = Alarm(cfg.reward.audit) if cfg.reward.audit is not None else None
        film_fps = env.fps if cfg.can_replay and cfg.runner.num_video_episodes else None
        run = Run(cfg.runner, folder, agent, agent_meta(*parts), eval_envs, client, log, alarm, film_fps)
        if cfg.runner.resume_dir is not None:
            run.take_over(Path(cfg.runner.resume_dir))
        if client is not None and not cfg.reward.of_windows:
            log.say(client.threshold_is)
        if cfg.runner.only_eval:
            run.resume(Path(cfg.runner.resume_dir))
        else:
            run.hard = keep_hard(cfg.reward, eval_envs.spec, client, folder, stack)
            learn(cfg, run, agent, client, lambda: let_critic_score(make_train_envs(), agent))
        trained = time.perf_counter()
        summary = run.measure()
        seconds = {
            "training": round(trained - start, 1),
            "evaluation": round(time.perf_counter() - trained, 1),
        }
        save_json({**summary, "seconds": seconds, "versions": versions()}, folder / "summary.json")
        run.draw(cfg.env.fps)
    print(
        f"{folder}: true success {summary['true_success_once']:.2f} once, "
        f"{summary['true_success_at_end']:.2f} at the end, of {summary['num_episodes']} fresh episodes"
    )


if __name__ == "__main__":
    run_script(main)
