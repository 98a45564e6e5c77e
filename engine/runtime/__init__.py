"""The process and the machine it runs on; knows nothing of videos or models.

device.py        device, precision, autocast, compiler, determinism, profiler
distributed.py   several processes: start, share, vote, end together
signals.py       Ctrl-C and the signals of a scheduler: save first, then end
log.py           RUN/log.txt, log.jsonl, TensorBoard, trackers; never ends a run
progress.py      progress bar on a terminal, progress lines elsewhere
peak.py          FLOP per second that matrix products reach here
"""
