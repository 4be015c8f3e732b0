"""Settings of transformers' Trainer for tests: on the CPU, and without a word."""

from transformers import TrainingArguments


def quiet_arguments(folder, batch_size: int, **options) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
