"""Diagnostics of Gradient Centralization: `probe` measures its effect before training, `Monitor` during training.

print(gradcentral.probe(model, loss, batches))
monitor = gradcentral.Monitor(model, optimizer, to="run.jsonl")
"""

from gradcentral.diagnostics.monitor import Monitor
from gradcentral.diagnostics.probe_report import LayerReport, ProbeReport
from gradcentral.diagnostics.probing import probe
from gradcentral.diagnostics.record import Reading, Record, plot_records
from gradcentral.diagnostics.record_files import read_records

__all__ = ["LayerReport", "Monitor", "ProbeReport", "Reading", "Record", "plot_records", "probe", "read_records"]
