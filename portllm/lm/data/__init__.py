"""Tasks and text: the source of rows, the requests made of a model, and both as tokens.

tasks.py      a task by its name: definition, folder of data, training pairs
stock.py      the harness's own task definitions, located without parsing all of them
own.py        a user's own task: task.yaml, and rows of prompt and completion or of messages
prompts.py    a task file rendered with jinja alone: prompt, answer, choices
asking.py     the harness's own task object, and the requests it makes of each row
preparing.py  a task's data prepared: read, checked, test rows kept out of training
corpora.py    real text to train a release on, rendered in one form
sources.py    files of the user's, or the hub at one commit
tables.py     parquet, jsonl, csv and text files as tables, read strictly
columns.py    the columns of the paper's seven tasks
encoding.py   pairs and running text as tokens
"""
