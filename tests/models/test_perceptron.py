import numpy as np


def test_is_one_linear_layer(configured, filled, image, run):
    module = configured("perceptron")
    variables = filled(module, image)
    logits, taps = run(module, variables, image)
    head = variables["params"]["head"]
    assert head["kernel"].shape == (64, 10)
    np.testing.assert_allclose(logits, image.reshape(4, 64) @ head["kernel"] + head["bias"], atol=1e-5)
    assert set(taps) == {"input", "logits"}
