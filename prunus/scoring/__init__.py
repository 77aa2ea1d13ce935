"""How important each unit is: formulas, and what the calibration text says about them."""
