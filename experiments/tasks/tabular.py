"""The breast cancer and wine data of scikit-learn with random labels.

Features have mean 0 and deviation 1 over the examples that are not test examples. An
MLP with two hidden layers of 64 is trained on 300 (breast cancer) or 90 (wine)
examples, and the other 100 or 30 validate; four seeds validate on all that is not test.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer, load_wine

from experiments.harness.networks import mlp
from experiments.tasks import Task, with_random_labels


def load(name: str, variant: str) -> Task:
    """One of the two tables, with a percentage of random labels."""
    cancer = name.startswith("cancer")
    features, labels = (load_breast_cancer if cancer else load_wine)(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(features))
    features, labels = features[order], labels[order].astype(np.int32)
    pool = 400 if cancer else 120
    features = (features - features[:pool].mean(0)) / features[:pool].std(0)
    classes = int(labels.max()) + 1
    return Task(
        name=name,
        inputs=features.astype(np.float32),
        labels=labels,
        given_labels=with_random_labels(labels, int(variant) / 100, classes),
        pool=np.arange(pool),
        test=np.arange(pool, len(features)),
        groups=np.arange(len(features)),
        training=300 if cancer else 90,
        validation=100 if cancer else 30,
        classes=classes,
        network=mlp(features.shape[1], 64, 64, classes),
        epochs=60,
        batch=30 if cancer else 15,
        epochs_per_call=3,
        folds=4,
    )
