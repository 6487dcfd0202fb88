"""Sentinels: training that notices when it is being fooled.

Every few updates the model draws the same few prompts from the same noises as always, and rules compare what it draws
with the base model and with the best it has drawn so far (docs/sentinels.md).

    config.py    the `sentinels` section of a run file
    measure.py   the pictures of one look and their numbers
    rules.py     numbers -> findings -> ok, warning or hacking; pure functions
    watch.py     what is remembered from look to look, and what an alarm does to the run
    series.py    the looks in the rows of metrics.jsonl
"""
