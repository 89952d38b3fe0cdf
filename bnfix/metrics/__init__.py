"""From outputs to metrics, intervals and paired differences; the gate that decides by them."""
