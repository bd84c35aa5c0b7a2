"""Evaluation, from a checkpoint to a page.

    checkpoint + data -> run -> evaluate -> result (predictions.jsonl, summary.json)
                                score, interventions
    results + metrics -> collect -> tables, figures, examples -> report -> page (index.html, PNG)
                                    wording

`flops` counts the arithmetic of training and answering from a model's configuration.
"""
