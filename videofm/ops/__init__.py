"""Operations that models, objectives and samplers share; each file is one idea. Imports layer 0 only."""
