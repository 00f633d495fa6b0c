"""How each drawn task is planned and drawn: a plan holds everything an answer depends on."""
