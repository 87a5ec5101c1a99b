"""A run's evaluations and its results: the predictions, the model folder, and the model folder of averaged weights."""

import torch

from erann_dist.data.sources import count_reported
from erann_dist.log.events import Evaluated, EvaluationProgress, Incident
from erann_dist.models.base import AudioModel
from erann_dist.storage.folder import open_folder
from erann_dist.storage.slow_reads import SlowReads
from erann_dist.train import checkpoint, evaluation, memory
from erann_dist.train.async_checkpoint import AsyncCheckpoints
from erann_dist.train.evaluation import Predictions
from erann_dist.train.model_folder import ModelInfo, model_card, save_model
from erann_dist.train.reporter import Reporter
from erann_dist.train.run import Run


class Finisher:
    """Evaluates and writes results. All workers call its methods."""

    def __init__(
        self, run: Run, model: AudioModel, checkpoints: AsyncCheckpoints, reporter: Reporter, slow: SlowReads
    ) -> None:
        """slow: also counts the evaluation's slow reads."""
        self._run, self._model = run, model
        self._checkpoints, self._reporter = checkpoints, reporter
        self._slow = slow

    def evaluate(self, step: int, averaged: int | None = None) -> Predictions | None:
        """Score the evaluation clips. Rank 0 gets the predictions, or None when the scores are not finite.

        averaged: the number of checkpoints of which the model's weights are the mean. Non-finite scores are an incident
        during the training, and raise NotFinite at its end.
        """
        run, emit = self._run, self._reporter.emit

        def progress(done: int, total: int) -> None:
            run.watchdog.alive()
            emit(EvaluationProgress(step, done, total))

        try:
            predictions = evaluation.score(
                self._model,
                run.eval_clips,
                run.workers,
                loader_threads=run.recipe.data.loader_threads,
                pad_samples=run.recipe.evaluate.pad_samples,
                progress=progress,
                slow=self._slow,
            )
        except torch.OutOfMemoryError as error:
            raise memory.too_small_to_evaluate(run.eval_clips) from error
        except evaluation.NotFinite as error:
            if step == run.steps:
                raise
            emit(Incident(step, "evaluation", str(error)))
            predictions = None
        ranks_checkpoints = bool(run.recipe.checkpoint.keep_best) and averaged is None
        if ranks_checkpoints:
            self._checkpoints.wait()
        if predictions and (writer := self._checkpoints.writer):
            metrics = evaluation.summarise(predictions, run.eval_clips.info.task)
            for event in writer.record(step, metrics) if ranks_checkpoints else []:
                emit(event)
            emit(Evaluated(step, len(run.eval_clips), metrics, averaged))
        return predictions

    def finish(self) -> None:
        """After the last step: the last checkpoint, the evaluations and the model folders."""
        run, model = self._run, self._model
        self._checkpoints.finish()
        if run.recipe.evaluate.average_last:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            number = self._average_weights(run.recipe.evaluate.average_last)
            averaged = self.evaluate(run.steps, averaged=number)
            run.on_rank_zero(lambda: self._write_model("model-averaged", averaged))
            model.load_state_dict(weights)
        predictions = self.evaluate(run.steps)
        run.on_rank_zero(lambda: self._write_results(predictions))
        if predictions:
            self._reporter.finish(evaluation.summarise(predictions, run.clips.info.task))
        run.workers.barrier()

    def _average_weights(self, number: int) -> int:
        """Load the mean of the last checkpoints' weights, and return how many there were."""
        run = self._run
        names: list[str] = []
        if run.workers.is_rank_zero:
            names = checkpoint.regular(checkpoint.committed(run.folder), run.is_checkpoint_due)
            names = [name for name in names if checkpoint.is_whole(run.folder, name)][-number:]
        names = run.workers.broadcast(names)
        mean = checkpoint.mean(run.folder, names, run.watchdog.alive)
        self._model.load_state_dict({k.removeprefix("model."): v for k, v in mean.items() if k.startswith("model.")})
        return len(names)

    def _write_results(self, predictions: Predictions | None) -> None:
        """Write the evaluation's scores, then the model, which marks the run as finished."""
        assert predictions
        self._require_last_start()
        with self._run.folder.writing("predictions.parquet") as file:
            evaluation.write_predictions(file, predictions, self._run.eval_clips)
        self._write_model("model", predictions)

    def _write_model(self, name: str, predictions: Predictions | None) -> None:
        assert predictions
        run, info = self._run, self._run.clips.info
        listed = len(run.eval_clips) + sum(count_reported(source) for source in run.recipe.data.eval)
        metrics = evaluation.detail(predictions, run.eval_clips, listed)
        variant, pad_samples = run.recipe.model.variant, run.recipe.evaluate.pad_samples
        model_info = ModelInfo(
            variant,
            info.task,
            info.label_ids,
            info.label_names,
            info.sample_rate,
            pad_samples,
            self._model.front_end.as_dict(),
        )
        card = model_card(model_info, metrics, run.recipe)
        self._require_last_start()
        save_model(open_folder(f"{run.folder}/{name}"), self._model, model_info, metrics, card)

    def _require_last_start(self) -> None:
        """Raise Superseded when the run has been started again since."""
        assert self._checkpoints.writer
        self._checkpoints.writer.start.require_last()
