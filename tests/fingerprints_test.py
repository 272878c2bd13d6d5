import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import fingerprints


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_sum_of_bits_sees_every_bit_and_every_position(dtype):
  x = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.5, (6, 5))).astype(dtype)
  sums = {int(fingerprints.sum_bits(x))}
  raw = x.tobytes()
  bits_each = 1 if dtype == jnp.bool_ else 8
  for byte in range(len(raw)):
    for bit in range(bits_each):
      changed = bytearray(raw)
      changed[byte] ^= 1 << bit
      y = np.frombuffer(bytes(changed), x.dtype).reshape(x.shape)
      sums.add(int(fingerprints.sum_bits(y)))
  assert len(sums) == 1 + len(raw) * bits_each
  sums.add(int(fingerprints.sum_bits(np.roll(x, 1))))
  assert len(sums) == 2 + len(raw) * bits_each
