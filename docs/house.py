def svg(): return "<svg></svg>"
