"""What the default labels reach on real images, from a client of 1,000, at a total ε of one."""

import numpy as np
import pytest
import torch

from datamodules.mixed_digits import mixed_digits
from ecos_pl.accounting import epsilon_of
from ecos_pl.client_answers import prototype_answer
from ecos_pl.coverage import coverage_release
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import to_tensor
from ecos_pl.invariance import random_view
from ecos_pl.labeling import LabelingTask
from ecos_pl.messages import query_id_of, read_query
from ecos_pl.privacy import PER_SAMPLE
from ecos_pl.private_images import Features
from ecos_pl.prototype_labeler import PrototypeLabeler

NUM_PROXIES = 500
NUM_VIEWS = 2


@pytest.mark.slow
def test_four_of_five_labels_are_right_at_a_total_epsilon_of_one():
    scenario = mixed_digits()
    labeler = PrototypeLabeler(scenario.classes, num_views=NUM_VIEWS)
    spec = EncoderSpec(features=labeler.features)
    encoder = Encoder(spec)
    number = {name: k for k, name in enumerate(scenario.classes)}

    def classes_of(source, indices):
        return torch.tensor([number[source.labels[i]] for i in indices])

    def embed(images):
        return torch.cat([encoder(some) for some in torch.stack(images).split(250)])

    def read(source, indices):
        return [to_tensor(source.read(i), spec.image_size) for i in indices]

    client, pool = scenario.client_train, scenario.pool
    client_rows = embed(read(client, range(len(client))))
    client_classes = classes_of(client, range(len(client)))
    in_domain = np.array([i for i, name in enumerate(pool.domains) if name == "mnist"])
    indices = in_domain[:: len(in_domain) // NUM_PROXIES]  # they lie there class by class
    images = read(pool, indices)
    generator = torch.Generator().manual_seed(0)
    views = [random_view(image, generator) for image in images for _ in range(NUM_VIEWS)]
    rows = embed(images)
    with_views = torch.cat([rows[:, None], embed(views).view(len(rows), NUM_VIEWS, -1)], dim=1)
    counts = [coverage_release(8.0, 1.0)]

    def ask(content):
        query = read_query(content)
        points = Features(query.project(client_rows), PER_SAMPLE, client_classes)
        return prototype_answer(query, query_id_of(content), points).draw()

    labels = labeler.label(
        LabelingTask(
            pool=pool,
            indices=indices,
            embeddings=lambda: [rows.numpy()],
            views=lambda num_views: [with_views.numpy()],
            encoder=spec,
            encoder_fingerprint="f" * 64,
            ask=ask,
            planned=labeler.plan(counts, max_epsilon=1.0, delta=1e-5, sample_rate=1.0),
            seed=1,
            attempt=0,
        )
    )
    assert len(client) == 1000
    assert epsilon_of([*counts, *labels.releases], 1e-5) <= 1.0
    right = (labels.targets.argmax(dim=1) == classes_of(pool, indices)).float().mean()
    assert float(right) > 0.8  # 0.94 on average, 0.01 the standard deviation over noise
