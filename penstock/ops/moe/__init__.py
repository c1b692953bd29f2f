"""Mixture of experts: moe_route chooses the experts of each token, fused_moe computes them and adds them up.

slot      one (token, choice) pair: token t's j-th expert is slot t·k + j, and a token's outputs are summed in slot order
sorted    slots in the order of their experts, the order of the rows in both matrix products; slots of one expert stay in order
"""
