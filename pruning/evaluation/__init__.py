"""How well a plan answers: labelled rows, measures, and the engine protocol that scores them."""
