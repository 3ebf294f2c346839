from gradcentral.experiment.results import Comparison


def write_report(comparison: Comparison) -> None:
    (comparison.out / "summary.csv").write_text(comparison.to_csv(), encoding="utf-8")
