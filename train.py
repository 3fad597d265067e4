"""Train an encoder: python train.py method=moco data=cifar10 (--help lists the groups, the README has a command per use)."""

from pathlib import Path

from twoviews.config.building import build
from twoviews.config.entry import entry


@entry("train")
def main(cfg, folder: Path) -> int:
    """Configuration to parts, parts to the loop, results to the folder; returns the exit code."""
    from twoviews import distributed, process_group
    from twoviews.recording import Recording, show_if_finished

    if show_if_finished(cfg, folder):
        return 0

    from twoviews.assembly import check_without_data, load_data, make_parts, make_views
    from twoviews.batch_size import find_batch
    from twoviews.config.fitting import fit_to_data, keys_set_by_user
    from twoviews.console import Console
    from twoviews.figures import files_of
    from twoviews.loop import Training
    from twoviews.monitoring import NotFinite
    from twoviews.pictures import draw_views
    from twoviews.run_summary import print_summary
    from twoviews.stop_signal import StopSignal

    runtime = build(cfg.runtime)
    with StopSignal() as stop, process_group.group(runtime.torch_device()) as device:
        check_without_data(cfg, runtime, device)
        if cfg.find_batch:
            return find_batch(cfg, device, folder)
        console = Console(quiet=distributed.rank() > 0)
        data = load_data(cfg).to(device)
        fitted = fit_to_data(cfg, len(data.train), distributed.processes(), fixed=keys_set_by_user(folder))
        for note in (*data.notes, *fitted):
            console.say(note)
        views = make_views(cfg, data)
        if cfg.preview:
            draw_views(folder / "views.png", data.train, views, cfg.seed)
            console.say(f"views: {', '.join(map(str, files_of(folder / 'views.png')))}")
            return 0
        parts = make_parts(cfg, data, views, runtime, device)
        print_summary(cfg, parts, folder, console)
        with Recording(cfg, folder, parts, console) as recording, stop.deferred():
            training = Training(
                parts, folder=folder, metrics=recording.metrics, console=console, epochs=cfg.epochs, seed=cfg.seed
            )
            recording.resume(training)
            try:
                finished = training.fit(stop)
                return recording.finish(training, finished, stop)
            except NotFinite as error:
                return recording.fail(training, str(error))


if __name__ == "__main__":
    main()
